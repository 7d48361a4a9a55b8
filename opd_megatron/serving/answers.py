"""From the bytes of an HTTP answer to decoded JSON or to the right error. Pure: no IO.

200 with JSON                  the value
200 with another type, empty   None
429, 503                       Busy: later
other 5xx                      Unanswered: may be tried again
400, 413, 422                  RequestRefused: this request can not succeed
any other status               ServerError
JSON that does not parse       ContractError
"""

from __future__ import annotations

from typing import Any

import orjson

from opd_megatron.errors import ContractError, RequestRefused, ServerError

_REQUEST_IS_WRONG = (400, 413, 422)
_LATER = (429, 503)
# What Retry-After may ask for; more is cut, because the call's own deadline decides.
_MAX_RETRY_AFTER_S = 60.0


class Unanswered(Exception):
    """A try that may be repeated: no connection, a lost one, or a status that says try again."""


class Busy(Unanswered):
    """429 or 503. `after_s`: how long the server wants to be left alone; 0 when it does not say."""

    def __init__(self, cause: str, after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.after_s = after_s


def read_answer(status: int, content_type: str, raw: bytes, retry_after: str | None = None) -> Any:
    """Decode one answer.

    Args:
        retry_after: value of that header.

    Raises:
        Unanswered, Busy, RequestRefused, ServerError, ContractError: see the module docstring.
    """
    is_json = content_type == "application/json"
    try:
        answer = orjson.loads(raw) if is_json and raw else None
    except orjson.JSONDecodeError as error:
        if status == 200:
            raise ContractError(f"status {status}, body is not JSON: {error}") from error
        answer = None
    if status == 200:
        return answer
    message = error_message(answer) or raw[:200].decode(errors="replace")
    cause = f"status {status}: {message}"
    if status in _LATER:
        raise Busy(cause, _seconds(retry_after))
    if status >= 500:
        raise Unanswered(cause)
    if status in (401, 403):
        cause += " (not this run's key: is another process on this port?)"
    raise RequestRefused(cause) if status in _REQUEST_IS_WRONG else ServerError(cause)


def error_message(body: Any) -> str | None:
    """The message of an error body in any of SGLang's four shapes, or None when it is none of them.

    `{"error": {"message": m}}`, `{"error": m}`, `{"object": "error", "message": m}`,
    `{"success": false, "message": m}`.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error["message"]
    if isinstance(error, str):
        return error
    flagged = body.get("object") == "error" or body.get("success") is False
    if flagged and isinstance(body.get("message"), str):
        return body["message"]
    return None


def _seconds(retry_after: str | None) -> float:
    """Retry-After in seconds; a date, which would need this machine's clock to be right, counts as 0."""
    if retry_after is None or not (retry_after.isascii() and retry_after.isdigit()):
        return 0.0
    return min(float(retry_after[:6]), _MAX_RETRY_AFTER_S)
