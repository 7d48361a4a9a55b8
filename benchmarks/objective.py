"""The loss that the methods differentiate, and its exact gradient in float64.

    top-K family:   sum_t w_t ( sum_k q_tk (log q_tk - log pi_tk)  -  A_t log pi_t(y_t)  -  c H_t )
    dense family:   sum_t w_t KL(pi_t || q_t), over the whole vocabulary

q the teacher, A a fixed advantage, H the student's entropy. A method that lacks an output drops its
term: `terms` says which are in, and the reference gradient has the same ones.

Shape suffixes: T tokens, V vocabulary, K support.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from benchmarks.catalog import DENSE, ENTROPY, KL, SAMPLED
from benchmarks.inputs import Inputs

# Larger than in recipes, so that a wrong entropy gradient shows in the gradient error.
ENTROPY_COEFFICIENT = 0.1
# Rows of the gradient that are compared with float64.
_NUM_CHECKED_ROWS = 32


def topk_kl_T(logprobs_TK: torch.Tensor, teacher_logprobs_TK: torch.Tensor) -> torch.Tensor:
    """sum_k q (log q - log pi) over the support as it stands, [T] float32."""
    return (teacher_logprobs_TK.exp() * (teacher_logprobs_TK - logprobs_TK.float())).sum(-1)


def combine(
    inputs: Inputs,
    *,
    kl_T: torch.Tensor | None = None,
    sampled_logprobs_T: torch.Tensor | None = None,
    entropy_T: torch.Tensor | None = None,
    rows: slice = slice(None),
) -> torch.Tensor:
    """The weighted sum of the terms given, a float32 scalar; `rows` for a chunk of the tokens."""
    loss_T = torch.zeros_like(inputs.token_weights_T[rows])
    if kl_T is not None:
        loss_T = loss_T + kl_T.float()
    if sampled_logprobs_T is not None:
        loss_T = loss_T - inputs.advantages_T[rows] * sampled_logprobs_T.float()
    if entropy_T is not None:
        loss_T = loss_T - ENTROPY_COEFFICIENT * entropy_T.float()
    return (loss_T * inputs.token_weights_T[rows]).sum()


def reference_logits_grad(
    logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor | None,
    inputs: Inputs,
    topk: int,
    terms: Collection[str],
) -> torch.Tensor:
    """Gradient by the first rows of the logits, [min(T, 32), V] float64."""
    logp_TV = logits_TV.double().log_softmax(-1)
    p_TV = logp_TV.exp()
    num_rows = logits_TV.shape[0]
    grad_TV = torch.zeros_like(p_TV)
    if KL in terms:
        ids_TK, teacher_logprobs_TK = inputs.support(topk)
        q_TK = teacher_logprobs_TK[:num_rows].double().exp()
        grad_TV += q_TK.sum(-1, keepdim=True) * p_TV
        grad_TV.scatter_add_(1, ids_TK[:num_rows], -q_TK)
    if SAMPLED in terms:
        advantages_T1 = inputs.advantages_T[:num_rows, None].double()
        grad_TV += advantages_T1 * p_TV
        grad_TV.scatter_add_(1, inputs.target_ids_T[:num_rows, None], -advantages_T1)
    if ENTROPY in terms:
        entropy_T1 = -(p_TV * logp_TV).sum(-1, keepdim=True)
        grad_TV += ENTROPY_COEFFICIENT * p_TV * (logp_TV + entropy_T1)
    if DENSE in terms:
        if teacher_logits_TV is None:
            raise ValueError("teacher_logits_TV: None seen, the dense term needs the teacher")
        gap_TV = logp_TV - teacher_logits_TV.double().log_softmax(-1)
        grad_TV += p_TV * (gap_TV - (p_TV * gap_TV).sum(-1, keepdim=True))
    return grad_TV * inputs.token_weights_T[:num_rows, None].double()


def checked_rows(num_tokens: int) -> slice:
    return slice(0, min(num_tokens, _NUM_CHECKED_ROWS))


def relative_error(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    """|seen - wanted| / |wanted|, Euclidean norms over all entries."""
    return float((seen.double() - wanted).norm() / wanted.norm())
