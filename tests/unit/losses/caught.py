"""What a mutant test is: the check passes on ours and fails on the mutant."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def caught(check: Callable[..., None], ours: object, mutant: object) -> None:
    """The check passes on ours and fails on the mutant."""
    check(ours)
    with pytest.raises(AssertionError):
        check(mutant)
