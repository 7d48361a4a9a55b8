"""The proof that a server holds a version: it scores the probes as the learner does.

A 200 proves nothing: SGLang answers success to an update that changed no tensor. Checksums would
not do either: the server hashes its fused tensors, and on a GPU with a kernel of its own, so they
cannot be computed from the learner's. A probe goes through every layer, in the very engine that will
generate. What it cannot see is a difference below the tolerance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opd_megatron.errors import ContractError, NumericsError, ServerError
from opd_megatron.serving.client import SglangClient
from opd_megatron.weight_sync.route import Offer


def expected_logprobs(offer: Offer) -> list[NDArray[np.float64]]:
    """The probes' log-probs, checked.

    Raises:
        ContractError: no probe, or one that proves nothing.
        NumericsError: the learner's log-probs are not finite.
    """
    if not offer.probe_tokens:
        raise ContractError("probe_tokens is empty: weights cannot be verified without a probe")
    arrays = []
    for tokens, logprobs in zip(offer.probe_tokens, offer.probe_logprobs, strict=True):
        if len(tokens) < 2 or len(logprobs) != len(tokens) - 1:
            raise ContractError(
                f"a probe of {len(tokens)} tokens has {len(logprobs)} log-probs; "
                f"it must have at least two tokens and one log-prob less"
            )
        arrays.append(np.asarray(logprobs, dtype=np.float64))
    if not all(np.isfinite(array).all() for array in arrays):
        raise NumericsError("the learner's probe log-probs are not finite")
    return arrays


async def verify_weights(client: SglangClient, offer: Offer, *, tolerance_nats: float) -> float:
    """Check that a server holds the offered weights.

    Returns:
        Largest |server - learner| of one probe token, in nats.

    Raises:
        NumericsError: it answers with other weights than the learner's.
        ServerError: it reports another version.
        ContractError: the probes or its answers are malformed.
    """
    expected, version = expected_logprobs(offer), offer.version
    answer = await client.model_info()
    if answer.weight_version != version:
        raise ServerError(
            f"{client.name}: reports weight version {answer.weight_version}, not {version}"
        )
    scores = await client.score([(tuple(p[:1]), tuple(p[1:])) for p in offer.probe_tokens])
    deltas = []
    for score, wanted in zip(scores, expected, strict=True):
        if score.weight_version != version:
            raise ServerError(
                f"{client.name}: scored a probe with version {score.weight_version}, not {version}"
            )
        deltas.append(float(np.abs(score.logprobs - wanted).max()))
    worst = float(np.max(deltas))
    # Negated, so that a NaN fails too.
    if not worst <= tolerance_nats:
        raise NumericsError(
            f"{client.name}: does not hold the weights of version {version}: max |server - learner|"
            f" is {worst:.3g} nats over {len(deltas)} probes, allowed {tolerance_nats:g}"
        )
    return worst
