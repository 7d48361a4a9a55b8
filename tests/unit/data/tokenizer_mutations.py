"""Seeded mutations of the files of a real byte-level BPE tokenizer, each with the difference to be named for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think></think>' }}"
    "{%- endif -%}{%- endif -%}"
)
CORPUS = [
    "the student writes and the teacher scores every token of what the student wrote",
    "a teacher that ends with another token than the student teaches it never to stop",
    "probability mass, temperature, truncation: naïve café, 1234 + 5678 = 6912",
]
Files = dict[str, Any]
# name -> (mutation, what may be named)
Mutation = Callable[[Files, random.Random], None]


def make_tokenizer(directory: Path) -> Path:
    """Train a small byte-level BPE and save it as a model directory's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(directory)
    # Newer versions write the template to a file of its own; one place is enough here.
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": TEMPLATE})
    )
    end = fast.convert_tokens_to_ids("<|im_end|>")
    model = {"vocab_size": len(fast) + 8, "eos_token_id": end}
    (directory / "config.json").write_text(json.dumps(model))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return directory


def read(directory: Path) -> Files:
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    return {name: json.loads((directory / name).read_text()) for name in names}


def write(files: Files, directory: Path) -> None:
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def _vocab(files: Files) -> dict[str, int]:
    return files["tokenizer.json"]["model"]["vocab"]


def _added(files: Files) -> list[dict[str, Any]]:
    return files["tokenizer.json"]["added_tokens"]


def swap_two_ids(files: Files, rng: random.Random) -> None:
    one, other = rng.sample(sorted(_vocab(files)), 2)
    vocab = _vocab(files)
    vocab[one], vocab[other] = vocab[other], vocab[one]


def rotate_a_range(files: Files, rng: random.Random) -> None:
    tokens = sorted(_vocab(files), key=_vocab(files).__getitem__)
    start = rng.randrange(len(tokens) - 8)
    cut = tokens[start : start + 8]
    ids = [_vocab(files)[token] for token in cut]
    for token, index in zip(cut, ids[1:] + ids[:1], strict=True):
        _vocab(files)[token] = index


def respell_a_token(files: Files, rng: random.Random) -> None:
    old = rng.choice(sorted(_vocab(files)))
    new = old + rng.choice("xyz!")
    while new in _vocab(files):
        new += "q"
    _vocab(files)[new] = _vocab(files).pop(old)


def drop_a_token(files: Files, rng: random.Random) -> None:
    del _vocab(files)[rng.choice(sorted(_vocab(files)))]


def add_a_token(files: Files, rng: random.Random) -> None:
    index = max(max(_vocab(files).values()), *(t["id"] for t in _added(files))) + 1
    text = f"<|extra_{rng.randrange(10**6)}|>"
    if rng.random() < 0.5:
        _vocab(files)[text] = index
    else:
        _added(files).append(_added(files)[0] | {"id": index, "content": text})


def move_an_added_token(files: Files, rng: random.Random) -> None:
    one, other = rng.sample(range(len(_added(files))), 2)
    first, second = _added(files)[one], _added(files)[other]
    first["content"], second["content"] = second["content"], first["content"]


def rename_an_added_token(files: Files, rng: random.Random) -> None:
    token = rng.choice(_added(files))
    token["content"] = token["content"].replace("<", "<<")


def change_the_decoder(files: Files, rng: random.Random) -> None:
    files["tokenizer.json"]["decoder"] = rng.choice(
        [None, {"type": "Fuse"}, {"type": "Sequence", "decoders": [{"type": "Fuse"}]}]
    )


def swap_merges(files: Files, rng: random.Random) -> None:
    merges = files["tokenizer.json"]["model"]["merges"]
    one, other = rng.sample(range(len(merges)), 2)
    merges[one], merges[other] = merges[other], merges[one]


def drop_a_merge(files: Files, rng: random.Random) -> None:
    merges = files["tokenizer.json"]["model"]["merges"]
    del merges[rng.randrange(len(merges))]


def add_a_merge(files: Files, rng: random.Random) -> None:
    merges = files["tokenizer.json"]["model"]["merges"]
    merges.insert(rng.randrange(len(merges)), [rng.choice("abcdef"), rng.choice("ghijkl") + "~"])


def change_the_cutting(files: Files, rng: random.Random) -> None:
    tokenizer = files["tokenizer.json"]
    match rng.randrange(4):
        case 0:
            tokenizer["normalizer"] = {"type": rng.choice(["NFC", "NFKC", "Lowercase"])}
        case 1:
            tokenizer["pre_tokenizer"]["add_prefix_space"] = True
        case 2:
            tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
        case _:
            tokenizer["model"]["ignore_merges"] = not tokenizer["model"].get("ignore_merges")


def flip_an_added_flag(files: Files, rng: random.Random) -> None:
    token = rng.choice(_added(files))
    flag = rng.choice(["single_word", "lstrip", "rstrip", "normalized"])
    token[flag] = not token[flag]


def flip_special(files: Files, rng: random.Random) -> None:
    token = rng.choice(_added(files))
    token["special"] = not token["special"]
    decoded = files["tokenizer_config.json"].get("added_tokens_decoder", {}).get(str(token["id"]))
    if decoded is not None:
        decoded["special"] = token["special"]


def edit_the_template(files: Files, rng: random.Random) -> None:
    config = files["tokenizer_config.json"]
    template, at = config["chat_template"], rng.randrange(len(TEMPLATE))
    match rng.randrange(4):
        case 0:
            config["chat_template"] = template[:at] + rng.choice("abcXYZ_") + template[at:]
        case 1:
            config["chat_template"] = template[:at] + "#" + template[at + 1 :]
        case 2:
            config["chat_template"] = template.replace("enable_thinking", "thinking")
        case _:
            del config["chat_template"]


def move_the_end(files: Files, rng: random.Random) -> None:
    old = files["config.json"]["eos_token_id"]
    other = rng.choice([i for i in range(files["config.json"]["vocab_size"] - 8) if i != old])
    match rng.randrange(3):
        case 0:
            files["config.json"]["eos_token_id"] = [old, other]
        case 1:
            files["generation_config.json"]["eos_token_id"] = other
        case _:
            files["tokenizer_config.json"]["eos_token"] = "<|endoftext|>"


def resize(files: Files, rng: random.Random) -> None:
    files["config.json"]["vocab_size"] += rng.choice([-3, -1, 1, 8, 64, 1000])


MUTATIONS: dict[Mutation, frozenset[str]] = {
    swap_two_ids: frozenset({"tokens"}),
    rotate_a_range: frozenset({"tokens"}),
    respell_a_token: frozenset({"tokens"}),
    drop_a_token: frozenset({"tokens"}),
    add_a_token: frozenset({"tokens"}),
    move_an_added_token: frozenset({"tokens"}),
    rename_an_added_token: frozenset({"tokens"}),
    change_the_decoder: frozenset({"tokens"}),
    swap_merges: frozenset({"how text is cut into tokens"}),
    drop_a_merge: frozenset({"how text is cut into tokens"}),
    add_a_merge: frozenset({"how text is cut into tokens"}),
    change_the_cutting: frozenset({"how text is cut into tokens"}),
    flip_an_added_flag: frozenset({"how text is cut into tokens"}),
    flip_special: frozenset({"special tokens"}),
    edit_the_template: frozenset({"chat template"}),
    move_the_end: frozenset({"end tokens"}),
    resize: frozenset({"vocabulary size"}),
}


def shuffle_keys(files: Files, rng: random.Random) -> None:
    for name, content in files.items():
        keys = list(content)
        rng.shuffle(keys)
        files[name] = {key: content[key] for key in keys}


def write_merges_as_text(files: Files, rng: random.Random) -> None:
    model = files["tokenizer.json"]["model"]
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def pad_with_another_token(files: Files, rng: random.Random) -> None:
    files["tokenizer_config.json"]["pad_token"] = rng.choice(SPECIAL)


def change_limits(files: Files, rng: random.Random) -> None:
    files["tokenizer_config.json"]["model_max_length"] = rng.randrange(100, 10**6)
    files["tokenizer.json"]["truncation"] = {"max_length": 9}


def leave_out_what_is_off(files: Files, rng: random.Random) -> None:
    model = files["tokenizer.json"]["model"]
    for key in [key for key, value in model.items() if value in (None, False, "")]:
        del model[key]


NEUTRAL: tuple[Mutation, ...] = (
    shuffle_keys,
    write_merges_as_text,
    pad_with_another_token,
    change_limits,
    leave_out_what_is_off,
)
