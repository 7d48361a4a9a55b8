"""A tree of all sequences of a tiny language, so that expectations over sequences are exact sums.

Three tokens, at most three steps, token 0 ends a sequence: 15 sequences over 7 prefixes. A policy
is a table of logits, one row a prefix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from opd_megatron.losses.divergences import Divergence
from opd_megatron.losses.sequences import Sequences

VOCAB, LENGTH, END = 3, 3, 0
Prefix = tuple[int, ...]


def all_prefixes() -> list[Prefix]:
    found: list[Prefix] = [()]
    for prefix in found:
        if len(prefix) < LENGTH - 1:
            found.extend((*prefix, token) for token in range(VOCAB) if token != END)
    return found


PREFIXES = all_prefixes()
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
SEQUENCES = [(*p, t) for p in PREFIXES for t in range(VOCAB) if (*p, t) not in ROW]


def table(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Tree:
    """Log-probs of the sampled tokens of all sequences, packed, under three tables of logits."""

    student_T: torch.Tensor
    teacher_T: torch.Tensor
    behavior_T: torch.Tensor
    sequences: Sequences
    probability_B: torch.Tensor  # of each sequence under the behavior policy


def pack(student: torch.Tensor, teacher: torch.Tensor, behavior: torch.Tensor) -> Tree:
    rows = torch.tensor([ROW[s[:t]] for s in SEQUENCES for t in range(len(s))])
    tokens = torch.tensor([token for s in SEQUENCES for token in s])
    ids = torch.tensor([b for b, s in enumerate(SEQUENCES) for _ in s])
    student_T, teacher_T, behavior_T = (
        x.log_softmax(-1)[rows, tokens] for x in (student, teacher, behavior)
    )
    sequences = Sequences(ids, len(SEQUENCES))
    return Tree(student_T, teacher_T, behavior_T, sequences, sequences.sum(behavior_T).exp())


def declared_gradient(
    divergence: Divergence,
    discount: float,
    student: torch.Tensor,
    teacher: torch.Tensor,
    prefix_policy: torch.Tensor,
) -> torch.Tensor:
    """At every prefix, met as by `prefix_policy`: the gradient of the discounted cost-to-go."""
    logits = student.clone().requires_grad_()
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    reach = prefix_policy.log_softmax(-1).exp()
    here = divergence.terms(log_p, log_q).sum(-1)
    value = torch.zeros(len(PREFIXES), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        row = ROW[prefix]
        children = torch.tensor(
            [float(value[ROW[(*prefix, t)]]) if (*prefix, t) in ROW else 0.0 for t in range(VOCAB)],
            dtype=torch.float64,
        )
        cost = here[row] + discount * (log_p[row].exp() * children).sum()
        value[row] = cost.detach()
        steps = [reach[ROW[prefix[:t]], prefix[t]] for t in range(len(prefix))]
        total = total + cost * math.prod(float(x) for x in steps)
    total.backward()
    assert logits.grad is not None
    return logits.grad
