"""Errors a user can meet, and the exit codes they end a run with.

Exit codes follow sysexits.h: 0 done, 75 a retry helps, 78 configuration or data must change first.
Everything else (an uncaught exception, exit code 1) is a defect of this project.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_RETRY = 75
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130


class OpdError(Exception):
    """Base of every error this project raises on purpose.

    Attributes:
        exit_code: the code a process ends with when this error reaches its main function.
    """

    exit_code = EXIT_RETRY


class ConfigError(OpdError, ValueError):
    """Something a user can fix in a recipe, an override, a model directory or the environment."""

    exit_code = EXIT_CONFIG

    @classmethod
    def of(cls, key: str, value: object, rule: str, fix: str) -> ConfigError:
        """The four-part message: key, value seen, rule, fix."""
        return cls(f"{key}={value!r}: {rule}; {fix}")


class DataError(ConfigError):
    """Prompt data that cannot be used: unreadable file, too many bad rows, edited since the commit."""


class TokenizerMismatch(ConfigError):
    """Student and teacher do not mean the same by the same ids, or by the same text.

    Attributes:
        what: "tokens", "vocabulary size", "end tokens", or a form of data/tokenizer_form.py.
    """

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what

    @classmethod
    def between(
        cls, key: str, where: str, what: str, difference: str, fix: str
    ) -> TokenizerMismatch:
        """The four-part message."""
        rule = f"its tokenizer differs from the student's in {what}: {difference}"
        return cls(f"{key}={where!r}: {rule}; {fix}", what)


class ContractError(OpdError):
    """A server answered something that breaks the response contract; nothing of it is used."""


class InvalidRequest(ContractError):
    """A request that must not be sent, such as an id that would kill the server: no server is at fault."""


class ServerError(OpdError):
    """A server refused, timed out or could not be reached after the retry budget."""


class TimedOut(ServerError):
    """A server took a request and did not answer it in time."""


class Unreachable(ServerError):
    """A server could not be reached, or failed every time, within the retry budget."""


class RequestRefused(ServerError):
    """A server called one request wrong (400, 413, 422): repeating it can not help, other requests can."""


class RoleDied(OpdError):
    """A process of the run ended when it should not have."""


class Preempted(OpdError):
    """The run was asked to make room; what it had trained is committed."""


class Fenced(ConfigError):
    """Another attempt of the same run began while this one was alive: this one may write nothing more."""


class NumericsError(OpdError):
    """Log-probs of two engines, or a loss, are not what they must be; retrying will not help."""

    exit_code = EXIT_CONFIG


class StorageError(OpdError):
    """A file could not be written: no space, over quota, read-only. Commits made before are whole."""

    _NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

    @classmethod
    def of(cls, error: BaseException) -> StorageError | None:
        """What an error says about storage, or None when it is about something else.

        An operating system error, or any error that came of one: torch's file writer, stopped by a full disk, ends with
        a RuntimeError about positions in its file.
        """
        found: BaseException | None = error
        while found is not None:
            if isinstance(found, OSError) and found.errno in cls._NUMBERS:
                where = found.filename if found.filename is not None else "a file of the run"
                notes = "".join(f" ({note})" for note in getattr(found, "__notes__", ()))
                return cls(f"{where}: {found.strerror}{notes}; make room, then go on with --resume")
            found = found.__cause__ or found.__context__
        return None


class CheckpointError(OpdError):
    """A commit is missing, damaged or was made by a different configuration."""

    exit_code = EXIT_CONFIG


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
