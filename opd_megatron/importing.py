"""Importing large packages without the garbage collector.

Imports make hundreds of thousands of objects that live as long as the process, and each collection looks at all of
them: a fifth of the time that a tiny SGLang server takes to start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Collect nothing within the block, and never look again at what is alive at its end.

    Frozen objects also keep their pages shared with processes that are forked later.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Bindings made with nanobind report what the last collection leaves as leaks.
        atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()
