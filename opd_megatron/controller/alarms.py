"""Rollouts that went wrong: too many that never stop, too many that repeat themselves. Warns or ends the run.

Both shares are means over the last `alarms.window` trained steps. A warning is said once per rise above its limit;
`stop` ends the run with exit code 78, after the step and its metrics are recorded, so that the last commit can go on
with other settings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opd_megatron.config.schema import AlarmConfig
from opd_megatron.errors import EXIT_CONFIG, OpdError

# A loop: the same block of at most so many tokens, so often, at the end of the response.
_MAX_BLOCK = 32
_REPEATS = 8

TRUNCATED, REPETITIVE = "rollout/truncated_frac", "rollout/repetitive_frac"
_EXPLANATIONS = {
    TRUNCATED: (
        "responses reach rollout.max_new_tokens and never stop: compare the end tokens of student and teacher "
        "(teachers.NAME.aliases; `opd probe` shows where they end), or raise rollout.max_new_tokens"
    ),
    REPETITIVE: (
        "responses end in a loop: look at the rollouts of the report, lower optimizer.lr, and compare the end tokens "
        "of student and teacher"
    ),
}


class RolloutAlarm(OpdError):
    """The rollouts of a run went wrong and its recipe says to stop."""

    exit_code = EXIT_CONFIG


def is_repetitive(response_ids: Sequence[int]) -> bool:
    """Whether a response ends in one block of at most 32 tokens, eight times or more in a row.

    Example: (4, 5, 6, 5, 6, ..., 5, 6) with eight pairs is; seven pairs are not.
    """
    for block in range(1, min(_MAX_BLOCK, len(response_ids) // _REPEATS) + 1):
        end = response_ids[-_REPEATS * block :]
        if end[block:] == end[:-block]:
            return True
    return False


@dataclass
class _Watch:
    """One share and its limit."""

    metric: str
    key: str
    action: str
    limit: float
    recent: deque[float]
    is_above: bool = False

    def see(self, value: float) -> float | None:
        """The mean over a full window when it has just risen above the limit, else None."""
        self.recent.append(value)
        if len(self.recent) < (self.recent.maxlen or 1):
            return None
        mean = sum(self.recent) / len(self.recent)
        risen = mean > self.limit and not self.is_above
        self.is_above = mean > self.limit
        return mean if risen else None


@dataclass
class Alarms:
    """Sees the metrics of every trained step.

    Args:
        config: limits and what to do.
        say: where a warning goes.
    """

    config: AlarmConfig
    say: Callable[[str], None]
    _watches: list[_Watch] = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        wanted = (
            (TRUNCATED, "truncation", config.truncation, config.max_truncated_frac),
            (REPETITIVE, "repetition", config.repetition, config.max_repetitive_frac),
        )
        self._watches = [
            _Watch(metric, key, action, limit, deque(maxlen=config.window))
            for metric, key, action, limit in wanted
            if action != "none"
        ]

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """
        Raises:
            RolloutAlarm: a share rose above its limit, and its action is `stop`.
        """
        for watch in self._watches:
            mean = watch.see(metrics[watch.metric])
            if mean is None:
                continue
            limit = f"alarms.max_{watch.metric.removeprefix('rollout/')}={watch.limit:g}"
            message = (
                f"{watch.key} alarm at step {step}: {100 * mean:.0f}% of the responses of the last "
                f"{self.config.window} steps, more than {limit}: "
                f"{_EXPLANATIONS[watch.metric]}"
            )
            if watch.action == "stop":
                raise RolloutAlarm(
                    f"{message}; to go on all the same: --resume alarms.{watch.key}=warn"
                )
            self.say(message)
