"""Make the demo's teacher and student, by supervised training on one CPU thread (1-3 minutes).

    python -m opd_megatron.demo.make_models --out recipes/demo

The teacher (3 layers) learns from clean derivations. The student (2 layers) learns from noisy ones:
each digit of the response is replaced by a random digit with probability 0.11. So the student knows
the procedure (greedy decoding is right) but samples badly. That is what a base model looks like
before on-policy distillation, and why a small budget is enough; a student that has not understood
the task would need far more.

Three more teachers, for a curriculum, go on from the student with less and less noise; they are saved in bf16, in half
the bytes.

All are ordinary Hugging Face directories (config, generation config, safetensors, tokenizer).
The data comes along: distinct prompts of `add2`, so `train.jsonl` never meets `heldout.jsonl`; and
`demonstrations.jsonl`, right derivations for supervised training.

Seeds are fixed and one thread is used, so a rebuild on the same machine and versions gives the same
bytes; another CPU gives models of the same quality, not the same digits.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from opd_megatron.demo.add2 import (
    MAX_RESPONSE_TOKENS,
    Example,
    all_prompts,
    write_dataset,
    write_demonstrations,
    write_derivation,
)
from opd_megatron.demo.tokenizer import (
    END_OF_TEXT,
    IM_END,
    PAD,
    TOKEN_IDS,
    VOCAB_SIZE,
    decode_ids,
    encode_prompt,
    encode_text,
    save_tokenizer,
)
from opd_megatron.eval.column_addition import is_right_derivation

HIDDEN_SIZE = 64
CONTEXT_LENGTH = 512
NUM_TRAIN, NUM_HELDOUT, DATA_SEED = 4000, 256, 0
NUM_DEMONSTRATIONS = 1024
_FIRST_DIGIT, _LAST_DIGIT = TOKEN_IDS["0"], TOKEN_IDS["9"]


@dataclass(frozen=True)
class Training:
    """Settings of one supervised training."""

    num_layers: int
    num_steps: int
    batch_size: int
    digit_noise: float  # probability that a response digit is replaced by a random one
    seed: int
    peak_lr: float = 3e-3
    warmup_steps: int = 20


TEACHER = Training(num_layers=3, num_steps=500, batch_size=128, digit_noise=0.0, seed=100)
STUDENT = Training(num_layers=2, num_steps=900, batch_size=64, digit_noise=0.11, seed=0)
# Of a curriculum, in the order of their quality; each goes on from the one before, the first from the student.
CURRICULUM = {
    name: Training(
        num_layers=2, num_steps=120, batch_size=64, digit_noise=noise, seed=seed, peak_lr=1e-3
    )
    for name, noise, seed in (("early", 0.07, 201), ("middle", 0.045, 202), ("late", 0.025, 203))
}


def new_model(num_layers: int, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised tiny Qwen3 in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        # 0.02 is for widths in the thousands; at width 64 it would take hundreds of steps to leave
        # the start.
        initializer_range=1 / math.sqrt(HIDDEN_SIZE),
        pad_token_id=PAD,
        eos_token_id=IM_END,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config).float()


def encode_examples(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Prompts [B, P] and right-padded responses [B, L], with end token. Prompts have one length."""
    prompts_BP = torch.tensor([encode_prompt(example.prompt) for example in examples])
    responses = [[*encode_text(example.response), IM_END] for example in examples]
    longest = max(len(response) for response in responses)
    padded = [response + [PAD] * (longest - len(response)) for response in responses]
    return prompts_BP, torch.tensor(padded)


def replace_digits(responses_BL: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Replace each digit by a random digit with `probability` (which may be the same digit)."""
    is_digit = (responses_BL >= _FIRST_DIGIT) & (responses_BL <= _LAST_DIGIT)
    chosen = torch.rand(responses_BL.shape, generator=generator) < probability
    digits = torch.randint(_FIRST_DIGIT, _LAST_DIGIT + 1, responses_BL.shape, generator=generator)
    return torch.where(is_digit & chosen, digits, responses_BL)


def response_logprobs(model: Qwen3ForCausalLM, prompts_BP: Tensor, responses_BL: Tensor) -> Tensor:
    """Log-probs [B, L, V] of every token at each response position."""
    ids_BT = torch.cat([prompts_BP, responses_BL], dim=1)
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return logits_BTV[:, prompts_BP.shape[1] - 1 :].float().log_softmax(-1)


def train(model: Qwen3ForCausalLM, training: Training, prompts: list[str]) -> None:
    """Train in place: fresh demonstrations every step, loss on response tokens only."""
    rng = random.Random(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.peak_lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    for step in range(training.num_steps):
        warmup = min(1.0, (step + 1) / training.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / training.num_steps))
        optimizer.param_groups[0]["lr"] = training.peak_lr * warmup * (cosine + 0.02)
        examples = [write_derivation(rng.choice(prompts), rng) for _ in range(training.batch_size)]
        prompts_BP, responses_BL = encode_examples(examples)
        targets_BL = replace_digits(responses_BL, training.digit_noise, generator)
        logprobs_BLV = response_logprobs(model, prompts_BP, targets_BL)
        mask_BL = targets_BL != PAD
        chosen_BL = logprobs_BLV.gather(-1, targets_BL[..., None])[..., 0]
        loss = -(chosen_BL * mask_BL).sum() / mask_BL.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM, prompts_BP: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Responses [B, L], PAD after the end token. Greedy without a generator, else temperature 1."""
    cache = DynamicCache(config=model.config)
    inputs = prompts_BP
    ended = torch.zeros(len(prompts_BP), dtype=torch.bool)
    tokens: list[Tensor] = []
    for _ in range(MAX_RESPONSE_TOKENS):
        logits_BV = model(
            input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        if generator is None:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
        token_B = torch.where(ended, PAD, token_B)
        tokens.append(token_B)
        ended = ended | (token_B == IM_END)
        inputs = token_B[:, None]
    return torch.stack(tokens, dim=1)


def is_right(prompt: str, response_ids: list[int]) -> bool:
    """Strict: the response ended, and every step of it is right."""
    if IM_END not in response_ids:
        return False
    response_ids = response_ids[: response_ids.index(IM_END)]
    has_special = any(index in (PAD, END_OF_TEXT) for index in response_ids)
    return not has_special and is_right_derivation(prompt, decode_ids(response_ids))


def accuracy(model: Qwen3ForCausalLM, prompts: list[str], num_samples: int, seed: int) -> float:
    """Share of right responses, `num_samples` a prompt at temperature 1; greedy when it is 0."""
    repeated = [prompt for prompt in prompts for _ in range(max(num_samples, 1))]
    generator = torch.Generator().manual_seed(seed) if num_samples else None
    prompts_BP = torch.tensor([encode_prompt(prompt) for prompt in repeated])
    responses = sample(model, prompts_BP, generator).tolist()
    right = [is_right(p, r) for p, r in zip(repeated, responses, strict=True)]
    return sum(right) / len(right)


def save_model(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Write the Hugging Face directory: weights, config, generation config, tokenizer."""
    model.generation_config = GenerationConfig(
        eos_token_id=IM_END, pad_token_id=PAD, do_sample=True, temperature=1.0
    )
    model.save_pretrained(directory)
    # Shipped files are readable by everybody; the safetensors writer leaves them to their owner.
    (directory / "model.safetensors").chmod(0o644)
    save_tokenizer(directory, CONTEXT_LENGTH)


def make_model(training: Training, directory: Path) -> None:
    """Train, save and print what the model can do on 256 held-out prompts."""
    started = time.monotonic()
    model = new_model(training.num_layers, training.seed)
    train(model, training, all_prompts(held_out=False))
    save_model(model, directory)
    _report(model, directory, started)


def make_curriculum(student: Path, out: Path) -> None:
    """Train the teachers of the curriculum from a student, and save each as `out/teacher_NAME` in bf16."""
    model = Qwen3ForCausalLM.from_pretrained(student, dtype=torch.float32)
    for name, training in CURRICULUM.items():
        started = time.monotonic()
        train(model, training, all_prompts(held_out=False))
        save_model(copy.deepcopy(model).bfloat16(), out / f"teacher_{name}")
        _report(model, out / f"teacher_{name}", started)


def _report(model: Qwen3ForCausalLM, directory: Path, started: float) -> None:
    heldout = random.Random(DATA_SEED).sample(all_prompts(held_out=True), NUM_HELDOUT)
    greedy = accuracy(model, heldout, 0, seed=0)
    sampled = accuracy(model, heldout, 8, seed=0)
    print(
        f"{directory}: greedy {greedy:.3f}, mean@8 {sampled:.3f}, {model.num_parameters():,} "
        f"parameters, {time.monotonic() - started:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    write_dataset(out, NUM_TRAIN, NUM_HELDOUT, DATA_SEED)
    write_demonstrations(out / "demonstrations.jsonl", NUM_DEMONSTRATIONS, DATA_SEED)
    make_model(TEACHER, out / "teacher")
    make_model(STUDENT, out / "student")
    make_curriculum(out / "student", out)


if __name__ == "__main__":
    main()
