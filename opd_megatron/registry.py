"""A named table of functions: graders, objectives, corrections. One line per entry, typos get a suggestion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from opd_megatron.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to entries.

    Args:
        kind: what the entries are, for error messages, e.g. "grader".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry under `name`; a second entry of the same name is our own bug."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} registered twice"
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str, key: str = "") -> T:
        """Return the entry. `key` is the recipe key that named it, for the message.

        Raises:
            ConfigError: no entry of that name.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise ConfigError(
                f"{key or self.kind}={name!r}: no such {self.kind}"
                f"{did_you_mean(name, self._entries)}; use one of: {known}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries
