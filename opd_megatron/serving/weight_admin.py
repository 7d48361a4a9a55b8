"""What a weight update asks of one SGLang server; all of it under the admin key.

    pause, resume        end the requests in flight, or keep them, and hold new ones back; let them go on
    set_label            the version that answers carry
    load_directory       weights, label and a flushed cache in one request
    join_group .. leave_group, open_session, receive, close_session, flush
                         the pieces of an update over a broadcast group

Nothing is sent twice: a repeated `receive` would wait for a broadcast that nobody sends. Each call
has its own budget of time, because the server answers only when the work is done.

Traps of SGLang 0.5.23: weights from a group are refused outside of a session; a tensor name it does
not know is a success; the label changes only when a request says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.errors import RequestRefused, ServerError, Unreachable
from opd_megatron.serving.answers import Unanswered
from opd_megatron.serving.transport import HttpTransport

# An answer that carries it is refused by contract.py: no version is made of letters.
STALE_LABEL = "stale"
_GROUP_BROKE = ("Failed to receive weights", "Failed to initialize custom process group")
# For requests that are over before their callers know to leave the server.
_IDLE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where the members of a broadcast group meet; rank 0 is the learner."""

    name: str
    host: str
    port: int
    world_size: int
    backend: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel as one flat array of bytes, in this order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class WeightAdmin:
    """The weight routes of one server."""

    def __init__(self, http: HttpTransport, admin_key: str) -> None:
        self._http = http
        self._key = admin_key

    async def pause(self, timeout_s: float, *, keep_requests: bool = False) -> None:
        """Hold back new requests, and end every one in flight (its caller gets an error) or keep it.

        One that is kept loses its cache, not its tokens: when generation goes on, prompt and tokens are read again
        under the weights of then, so that every later token is drawn from those alone.
        """
        mode = "retract" if keep_requests else "abort"
        await self._post("/pause_generation", {"mode": mode}, timeout_s)

    async def resume(self, timeout_s: float) -> None:
        await self._post("/continue_generation", {}, timeout_s)

    async def set_label(self, label: str, timeout_s: float) -> None:
        """Label what is generated from now on. Answered by the engine itself, so it also proves that it lives."""
        body = {"new_version": label, "abort_all_requests": False}
        await self._post("/update_weight_version", body, timeout_s)

    async def load_directory(self, directory: Path, version: int, timeout_s: float) -> None:
        """Load a Hugging Face directory in place of the present weights and drop cached prefixes."""
        body = {"model_path": str(directory), "weight_version": str(version), "flush_cache": True}
        await self._post("/update_weights_from_disk", body, timeout_s)

    async def join_group(self, group: GroupAddress, first_rank: int, timeout_s: float) -> None:
        """Join with every tensor-parallel rank; answered when all members have met."""
        body = {
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": first_rank,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._post("/init_weights_update_group", body, timeout_s)

    async def leave_group(self, name: str, timeout_s: float) -> None:
        """Leave a group; not being in it is fine."""
        await self._post_unless_refused(
            "/destroy_weights_update_group", {"group_name": name}, timeout_s
        )

    async def open_session(self, timeout_s: float) -> None:
        await self._post("/begin_weight_update", {}, timeout_s)

    async def close_session(self, timeout_s: float) -> None:
        await self._post("/end_weight_update", {}, timeout_s)

    async def drop_session(self, timeout_s: float) -> None:
        """Close the session of an update that failed, if there is one."""
        await self._post_unless_refused("/end_weight_update", {}, timeout_s)

    async def receive(self, bucket: Bucket, dtype: str, group: str, timeout_s: float) -> None:
        """Take part in one broadcast and load what came; the label stays as it is."""
        body = {
            "names": bucket.names,
            "dtypes": [dtype] * len(bucket.names),
            "shapes": bucket.shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._post("/update_weights_from_distributed", body, timeout_s)

    async def flush(self, timeout_s: float) -> None:
        """Drop cached prefixes. Requests that a pause keeps hold none; those that it ended may take a moment to go."""
        try:
            await self._send("/flush_cache", {}, timeout_s)
        except RequestRefused:
            route = f"/flush_cache?timeout={min(_IDLE_TIMEOUT_S, timeout_s):g}"
            await self._send(route, {}, timeout_s)

    async def _post(self, route: str, body: Mapping[str, Any], timeout_s: float) -> None:
        answer = await self._send(route, body, timeout_s)
        said = isinstance(answer, dict) and answer.get("success", answer.get("status") == "ok")
        if said is not True:
            raise self._http.error(route, f"not confirmed: {str(answer)[:200]}")

    async def _post_unless_refused(
        self, route: str, body: Mapping[str, Any], timeout_s: float
    ) -> None:
        try:
            await self._send(route, body, timeout_s)
        except RequestRefused:
            return

    async def _send(self, route: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        try:
            return await self._http.request_once(
                "POST", route, key=self._key, body=body, timeout_s=timeout_s
            )
        except Unanswered as error:
            raise Unreachable(str(self._http.error(route, error))) from error


def is_consequence(error: ServerError) -> bool:
    """Whether a server only says that its group broke or never met, which another member may have done."""
    return isinstance(error, RequestRefused) and any(words in str(error) for words in _GROUP_BROKE)
