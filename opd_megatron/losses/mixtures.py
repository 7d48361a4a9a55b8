"""Several teachers as one distribution, exactly, from their logits or their whole log-probs.

    arithmetic_mean   q = sum_m w_m q_m             log q = logsumexp_m(log w_m + log q_m)
    geometric_mean    q = prod_m q_m^w_m / Z        log q + log Z = sum_m w_m log q_m

Both are elementwise over the vocabulary, so on tensor-parallel shards they need nothing but each teacher's log Z [T];
the geometric mean not even that, because whatever is constant in a row leaves the softmax as it is. What comes out are
logits: `teacher_logits.py` and `fused/dense.py` go on with them as with any teacher's. Weights are constants.

Shape suffixes: M teachers, T tokens, V vocabulary (`local_`: this rank's shard).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.checks import LOGPROB_DTYPES, LossInputError, check_dtype, check_shape


def check_weights(weights: Sequence[float]) -> None:
    """
    Raises:
        LossInputError: not above 0, or of another sum than 1.
    """
    if not weights or min(weights) <= 0.0 or abs(math.fsum(weights) - 1.0) > 1e-9:
        raise LossInputError(f"weights: {list(weights)} seen, above 0 and of sum 1 wanted")


@torch.no_grad()
def mixed_logits(
    mean: str,
    weights: Sequence[float],
    local_logits_TV: Sequence[torch.Tensor],
    log_z_T: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Logits whose softmax is the mean of the teachers' distributions.

    Args:
        mean: `arithmetic_mean` or `geometric_mean`.
        weights: [M], above 0, of sum 1.
        local_logits_TV: of each teacher, [T, V / tp], in the student's ids.
        log_z_T: of each teacher, [T] float32 or float64, over the whole vocabulary; read by the arithmetic mean.

    Returns:
        [T, V / tp] in the dtype of `log_z_T`.

    Raises:
        ConfigError: no such mean.
        LossInputError: wrong weights, dtype or shape, or not one of each for every teacher.
    """
    check_weights(weights)
    if not len(weights) == len(local_logits_TV) == len(log_z_T):
        raise LossInputError(
            f"mixed_logits: {len(weights)} weights, {len(local_logits_TV)} logits and {len(log_z_T)} log Z seen, "
            f"as many of each wanted"
        )
    shape = tuple(local_logits_TV[0].shape)
    for logits, log_z in zip(local_logits_TV, log_z_T, strict=True):
        check_shape("local_logits_TV", logits, shape)
        check_dtype("log_z_T", log_z, LOGPROB_DTYPES)
        check_shape("log_z_T", log_z, shape[:1])
    dtype = log_z_T[0].dtype
    if mean == "geometric_mean":
        mixed = torch.zeros(shape, dtype=dtype, device=local_logits_TV[0].device)
        for weight, logits in zip(weights, local_logits_TV, strict=True):
            mixed += weight * logits.to(dtype)
        return mixed
    if mean != "arithmetic_mean":
        raise ConfigError.of("mean", mean, "no such mean", "use arithmetic_mean or geometric_mean")
    mixed = None
    for weight, logits, log_z in zip(weights, local_logits_TV, log_z_T, strict=True):
        term = logits.to(dtype) + (math.log(weight) - log_z)[:, None]
        mixed = term if mixed is None else torch.logaddexp(mixed, term)
    assert mixed is not None
    return mixed
