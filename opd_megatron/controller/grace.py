"""Can this run commit within the time that its site gives it? Said as soon as a commit has been measured.

When a job's time limit comes near, the controller is told `cluster.grace_s` seconds before the end. It then finishes
the step that is being trained, hands over its weights, evaluates where that is due, and commits. A pre-emption gives
what Slurm's partition says (GraceTime, KillWait), which nobody here knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

# Of a step, what is still done after a request to stop.
_TO_THE_END = ("perf/learner_s", "perf/publish_s", "perf/sync_s")
# Of what was measured; file systems are slower on other days.
_MARGIN = 1.5


class GraceWatch:
    """Compares each measured commit with the grace time.

    Args:
        grace_s: None where nobody gives notice, as on one machine; 0 where the site gives none.
        say: told once, and again after a commit that did fit.
    """

    def __init__(self, grace_s: float | None, say: Callable[[str], None]) -> None:
        self._grace_s = grace_s
        self._say = say
        self._said = False

    def committed(self, commit_s: float, step: Mapping[str, float], evaluation_s: float) -> None:
        """
        Args:
            commit_s: from the beginning of a commit until a resume may start from it.
            step: perf/* of the newest step.
            evaluation_s: of the newest evaluation; 0 where there was none.
        """
        end_s = sum(step.get(name, 0.0) for name in _TO_THE_END) + evaluation_s
        needed_s = commit_s + end_s
        too_long = self._grace_s is not None and 0 < self._grace_s < needed_s
        if too_long and not self._said:
            self._say(
                f"warning: a commit took {commit_s:.1f} s, and the end of a step with its evaluation up to "
                f"{end_s:.1f} s; that is more than cluster.grace_s={self._grace_s:g}, so the time limit may cost the "
                f"steps since the last commit; cluster.grace_s={math.ceil(_MARGIN * needed_s)} would do"
            )
        self._said = too_long
