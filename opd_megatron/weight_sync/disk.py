"""Bring rollout servers to a published Hugging Face directory, and prove that they hold it.

    for every server, at once:
        update_weights_from_disk(directory, version)        drops cached prefixes too
        model_info                                          the label must be `version`
        score the probe sequences                           must equal the learner's own log-probs

A 200 proves nothing: SGLang answers success to an update that changed no tensor. Checksums would
not do either: the server hashes its fused tensors, and on a GPU with a kernel of its own, so they
cannot be computed from the file. A probe goes through every layer, in the very engine that will
generate. What it cannot see is a difference below the tolerance.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd_megatron.errors import ContractError, NumericsError, OpdError, ServerError
from opd_megatron.serving.client import SglangClient

# What a failed push is raised as, gravest first.
_KINDS = (NumericsError, ContractError, ServerError, OpdError)


@dataclass(frozen=True)
class ServerSync:
    """One server's update, proven. `max_delta` is in nats, over all probe tokens."""

    server: str
    update_s: float
    verify_s: float
    max_delta: float


@dataclass(frozen=True)
class SyncReport:
    """Every rollout server holds `version`."""

    version: int
    servers: tuple[ServerSync, ...]

    @property
    def max_delta(self) -> float:
        return max((server.max_delta for server in self.servers), default=0.0)


async def push_weights(
    clients: Sequence[SglangClient],
    directory: Path,
    version: int,
    probe_tokens: Sequence[Sequence[int]],
    probe_logprobs: Sequence[Sequence[float]],
    *,
    tolerance_nats: float,
) -> SyncReport:
    """Update every server and verify it; all of them succeed or an error names those that did not.

    Args:
        clients: the rollout servers. No request may be in flight: an update waits for them.
        directory: published weights (config.json, model.safetensors).
        version: the label of these weights.
        probe_tokens: sequences of at least two ids.
        probe_logprobs: for each, the learner's log-prob at temperature 1 of ids 1.. given those
            before them.
        tolerance_nats: largest allowed |server - learner| of one token.

    Raises:
        NumericsError: a server answers with other weights than the learner's.
        ServerError: a server refused, failed or reports another version.
        ContractError: the probes are malformed, or a server's answer is.
        After any of these the servers must be taken as stale.
    """
    expected = _expected_arrays(probe_tokens, probe_logprobs)
    outcomes = await asyncio.gather(
        *(
            _update(client, directory, version, probe_tokens, expected, tolerance_nats)
            for client in clients
        ),
        return_exceptions=True,
    )
    failures: list[OpdError] = []
    servers: list[ServerSync] = []
    for outcome in outcomes:
        if isinstance(outcome, ServerSync):
            servers.append(outcome)
        elif isinstance(outcome, OpdError):
            failures.append(outcome)
        else:
            raise outcome
    if failures:
        # Numerics first: a retry does not help there, and the exit code must say so.
        kind = next(kind for kind in _KINDS if any(isinstance(error, kind) for error in failures))
        failures.sort(key=lambda error: not isinstance(error, kind))
        summary = "; ".join(str(error) for error in failures)
        raise kind(
            f"weights of version {version} reached {len(servers)} of {len(clients)} servers: "
            f"{summary}"
        )
    return SyncReport(version, tuple(servers))


async def verify_weights(
    client: SglangClient,
    version: int,
    probe_tokens: Sequence[Sequence[int]],
    probe_logprobs: Sequence[Sequence[float]],
    *,
    tolerance_nats: float,
) -> float:
    """Check that a server holds a version's weights already, as after its restart.

    Returns:
        Largest |server - learner| in nats.

    Raises:
        NumericsError, ServerError, ContractError: as `push_weights`.
    """
    expected = _expected_arrays(probe_tokens, probe_logprobs)
    return await _verify(client, version, probe_tokens, expected, tolerance_nats)


def _expected_arrays(
    probe_tokens: Sequence[Sequence[int]], probe_logprobs: Sequence[Sequence[float]]
) -> list[NDArray[np.float64]]:
    if not probe_tokens:
        raise ContractError("probe_tokens is empty: weights cannot be verified without a probe")
    arrays = []
    for tokens, logprobs in zip(probe_tokens, probe_logprobs, strict=True):
        if len(tokens) < 2 or len(logprobs) != len(tokens) - 1:
            raise ContractError(
                f"a probe of {len(tokens)} tokens has {len(logprobs)} log-probs; "
                f"it must have at least two tokens and one log-prob less"
            )
        arrays.append(np.asarray(logprobs, dtype=np.float64))
    if not all(np.isfinite(array).all() for array in arrays):
        raise NumericsError("the learner's probe log-probs are not finite")
    return arrays


async def _update(
    client: SglangClient,
    directory: Path,
    version: int,
    probe_tokens: Sequence[Sequence[int]],
    expected: Sequence[NDArray[np.float64]],
    tolerance_nats: float,
) -> ServerSync:
    start = time.perf_counter()
    await client.update_weights_from_disk(directory, version)
    updated = time.perf_counter()
    delta = await _verify(client, version, probe_tokens, expected, tolerance_nats)
    return ServerSync(client.name, updated - start, time.perf_counter() - updated, delta)


async def _verify(
    client: SglangClient,
    version: int,
    probe_tokens: Sequence[Sequence[int]],
    expected: Sequence[NDArray[np.float64]],
    tolerance_nats: float,
) -> float:
    answer = await client.model_info()
    if answer.weight_version != version:
        raise ServerError(
            f"{client.name}: reports weight version {answer.weight_version}, not {version}"
        )
    scores = await client.score([(tuple(p[:1]), tuple(p[1:])) for p in probe_tokens])
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
