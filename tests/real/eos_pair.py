"""A Base student for the demo's teacher: the demo's student, which ends with <|endoftext|> instead of <|im_end|>.

The two tokens swap their rows of the (tied) embedding, so the Base student does what the demo's student does, with the
other end token. No prompt of the demo holds either.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opd_megatron.demo.tokenizer import END_OF_TEXT, IM_END

ALIAS = "teachers.main.aliases.<|endoftext|>=<|im_end|>"
_EMBEDDING = "model.embed_tokens.weight"


def make_base_student(demo: Path, directory: Path) -> Path:
    """Write it from the demo's student."""
    shutil.copytree(demo, directory)
    weights = load_file(directory / "model.safetensors")
    rows = torch.arange(len(weights[_EMBEDDING]))
    rows[[END_OF_TEXT, IM_END]] = rows[[IM_END, END_OF_TEXT]]
    weights[_EMBEDDING] = weights[_EMBEDDING][rows].contiguous()
    assert "lm_head.weight" not in weights, "the demo ties its embeddings"
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        _edit(directory / name, eos_token_id=END_OF_TEXT)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _edit(directory / name, eos_token="<|endoftext|>")
    _edit(directory / "tokenizer_config.json", extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    return directory


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
