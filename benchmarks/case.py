"""What one benchmark run measures: sizes, seed, device, effort; travels to the workers as JSON.

No torch here, so that the command line answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """Sizes and effort of one run.

    Attributes:
        device: "cpu" or "cuda".
        num_tokens: T, rows of logits.
        vocab_size: V, all columns are real ids.
        hidden_size: H of the methods that start at hidden states.
        topk: supports K to measure; every method runs with `main_topk`, some with all of them.
        seed: of every random tensor.
        max_repeats: timed calls a method, at most.
        max_seconds: no further round of timed calls starts after this long, once seven have run, and
            after five times as long in any case.
    """

    device: str
    num_tokens: int
    vocab_size: int
    hidden_size: int
    topk: tuple[int, ...]
    seed: int = 0
    max_repeats: int = 15
    max_seconds: float = 6.0

    @property
    def main_topk(self) -> int:
        """The K that every method runs with: the middle one."""
        return sorted(self.topk)[len(self.topk) // 2]

    @property
    def logits_bytes(self) -> int:
        """Bytes of the bfloat16 logits [T, V], the unit L of the tables."""
        return 2 * self.num_tokens * self.vocab_size

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        fields = json.loads(text)
        return Case(**{**fields, "topk": tuple(fields["topk"])})
