"""The tensors of a run: seeded, the same for every method, as peaked as a language model's.

    weight_VH ~ N(0, 1/H), so a row has length about 1
    hidden_t  = sum_i c_i weight[id_i] over a few random ids, c_i falling with the logarithm of the rank
    logits    = hidden @ weight^T, rounded to bfloat16 as a model's output layer rounds them

so z at id_i is about c_i and every other logit is noise. The teacher has the same ids with other
heights. Entropies come out between 1 and 3 nats; the worker records them, with a digest of the bits
by which the driver knows that all methods saw the same tensors.

Shape suffixes: T tokens, V vocabulary, H hidden, K support, P peaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.case import Case

# Peaks a row and the logit of the first: with them a noise of std |hidden| / sqrt(H) holds a few
# percent of the mass at H >= 512.
_NUM_PEAKS = 8
_FIRST_PEAK = 16.0
_PEAK_DECAY = 1.5
_PEAK_NOISE = 0.7
_MASKED_FRAC = 0.1
_OFF_SUPPORT_FRAC = 0.05
_BLOCK_ROWS = 64


@dataclass(frozen=True)
class Inputs:
    """What the methods get. Losses weigh token t by token_weights_T[t]; 10 % of them are 0."""

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    teacher_hidden_TH: torch.Tensor
    logits_TV: torch.Tensor | None
    teacher_logits_TV: torch.Tensor | None
    target_ids_T: torch.Tensor
    advantages_T: torch.Tensor
    token_weights_T: torch.Tensor
    support_ids_TK: torch.Tensor
    teacher_logprobs_TK: torch.Tensor

    def support(self, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's first `topk` ids and log-probs, [T, topk] int64 and float32."""
        ids_TK = self.support_ids_TK[:, :topk].contiguous()
        return ids_TK, self.teacher_logprobs_TK[:, :topk].contiguous()


def _row_blocks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, num_rows, _BLOCK_ROWS))


def _logits(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    return hidden_TH @ weight_VH.t()


def _hidden(
    weight_VH: torch.Tensor, ids_TP: torch.Tensor, heights_TP: torch.Tensor
) -> torch.Tensor:
    hidden_TH = torch.einsum("tp,tph->th", heights_TP, weight_VH[ids_TP].float())
    return hidden_TH.to(torch.bfloat16)


def _teacher_support(
    teacher_hidden_TH: torch.Tensor, weight_VH: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids: list[torch.Tensor] = []
    logprobs: list[torch.Tensor] = []
    for rows in _row_blocks(teacher_hidden_TH.shape[0]):
        logp_TV = _logits(teacher_hidden_TH[rows], weight_VH).float().log_softmax(-1)
        top = logp_TV.topk(topk, dim=-1)
        logprobs.append(top.values)
        ids.append(top.indices)
    return torch.cat(ids), torch.cat(logprobs)


def make_inputs(case: Case, *, with_logits: bool, with_teacher_logits: bool) -> Inputs:
    """The tensors of `case` on its device; logits only where the method starts at them."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(case.seed)
    num_tokens, vocab_size = case.num_tokens, case.vocab_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(vocab_size, shape, generator=generator, device=device)

    weight_VH = normal(vocab_size, case.hidden_size).div_(math.sqrt(case.hidden_size))
    weight_VH = weight_VH.to(torch.bfloat16)
    peak_ids_TP = ids(num_tokens, _NUM_PEAKS)
    ranks_P = torch.arange(1, _NUM_PEAKS + 1, device=device)
    heights_P = _FIRST_PEAK - _PEAK_DECAY * ranks_P.log()
    heights_TP = heights_P + _PEAK_NOISE * normal(num_tokens, _NUM_PEAKS)
    teacher_heights_TP = heights_P + _PEAK_NOISE * normal(num_tokens, _NUM_PEAKS)
    # The student's own samples: one of its peaks, and now and then any id.
    choice_T1 = torch.multinomial(heights_TP.softmax(-1), 1, generator=generator)
    sampled_T = peak_ids_TP.gather(1, choice_T1)[:, 0]
    target_ids_T = torch.where(uniform(num_tokens) < _OFF_SUPPORT_FRAC, ids(num_tokens), sampled_T)
    token_weights_T = (uniform(num_tokens) >= _MASKED_FRAC).float() / num_tokens
    advantages_T = normal(num_tokens)

    hidden_TH = _hidden(weight_VH, peak_ids_TP, heights_TP)
    teacher_hidden_TH = _hidden(weight_VH, peak_ids_TP, teacher_heights_TP)
    support_ids_TK, teacher_logprobs_TK = _teacher_support(
        teacher_hidden_TH, weight_VH, max(case.topk)
    )
    return Inputs(
        hidden_TH=hidden_TH,
        weight_VH=weight_VH,
        teacher_hidden_TH=teacher_hidden_TH,
        logits_TV=_logits(hidden_TH, weight_VH) if with_logits else None,
        teacher_logits_TV=_logits(teacher_hidden_TH, weight_VH) if with_teacher_logits else None,
        target_ids_T=target_ids_T,
        advantages_T=advantages_T,
        token_weights_T=token_weights_T,
        support_ids_TK=support_ids_TK,
        teacher_logprobs_TK=teacher_logprobs_TK,
    )


def _digest(tensor: torch.Tensor) -> int:
    return int(tensor.view(torch.int16).sum(dtype=torch.int64))


@torch.no_grad()
def describe(inputs: Inputs) -> dict[str, float | int]:
    """Digest of the tensors every method shares, and entropies in nats over the first rows."""
    logits_TV = _logits(inputs.hidden_TH[:_BLOCK_ROWS], inputs.weight_VH)
    teacher_logits_TV = _logits(inputs.teacher_hidden_TH[:_BLOCK_ROWS], inputs.weight_VH)

    def entropy(some_TV: torch.Tensor) -> float:
        logp_TV = some_TV.double().log_softmax(-1)
        return float(-(logp_TV.exp() * logp_TV).sum(-1).mean())

    return {
        "digest_hidden": _digest(inputs.hidden_TH),
        "digest_weight": _digest(inputs.weight_VH),
        "digest_logits_head": _digest(logits_TV),
        "digest_support": int(inputs.support_ids_TK.sum()),
        "digest_targets": int(inputs.target_ids_T.sum()),
        "student_entropy_nats": round(entropy(logits_TV), 3),
        "teacher_entropy_nats": round(entropy(teacher_logits_TV), 3),
        "student_mass_on_support": round(
            float(
                logits_TV.double()
                .softmax(-1)
                .gather(1, inputs.support_ids_TK[:_BLOCK_ROWS])
                .sum(-1)
                .mean()
            ),
            3,
        ),
    }
