"""What a run that goes on may change. Everything else would make it another run.

A resumed attempt starts from the run's own run.yaml, not from the recipe file, which may have been edited since;
overrides apply on top, and only to the keys below. The data and the vocabulary are compared by content when the
commit is read (controller/main.py), not here.
"""

from __future__ import annotations

from collections.abc import Iterable

from opd_megatron.config.overrides import changed_leaves
from opd_megatron.config.schema import SWITCHES, Recipe
from opd_megatron.errors import ConfigError

# Nothing that changes what is learned: how long, on which layout, shown and checked how often. A name that ends with a
# dot stands for its whole section.
_MAY_CHANGE = (
    "steps",
    "learner.",
    "controller.",
    "observe.",
    "checkpoint.",
    "preflight.",
    "alarms.",
    "evaluation.every",
    "weight_sync.",
    "summary",
    "student.path",
    "data.train",
    "data.heldout",
    "batch.tokens_per_microbatch",
    "batch.padded",
    "optimizer.decay_steps",  # the learner compares the whole curve
    "teaching.over_steps",  # together with `steps`, below
    "rollout.server.",
)
# Among those, what does change what is learned: the numbers that the student is computed in.
_MAY_NOT_CHANGE = ("learner.precision", "learner.fp8_")


def _matches(key: str, names: Iterable[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def may_change(keys: Iterable[str]) -> set[str]:
    """The keys among `keys` that a resumed attempt may change."""
    return {
        key
        for key in keys
        if (
            _matches(key, _MAY_CHANGE)
            or (key.startswith("teachers.") and (".server." in key or key.endswith(".offload")))
        )
        and not key.startswith(_MAY_NOT_CHANGE)
    }


def refuse_other_run(started: Recipe, resumed: Recipe) -> None:
    """
    Args:
        started: the recipe in the run's run.yaml.
        resumed: the same with the overrides of the resumed attempt.

    Raises:
        ConfigError: an override changes a key that may not change; one line a key.
    """
    changed = changed_leaves(started, resumed)
    refused = [key for key in changed if key not in may_change(changed)]
    refused_steps = _other_curriculum(started, resumed)
    if refused_steps and not refused:
        raise ConfigError(refused_steps)
    if refused:
        raise ConfigError(
            "\n".join(
                f"{key}={changed[key][1]!r}: this run was started with {changed[key][0]!r}, and --resume "
                f"may not change what is learned; leave it out, or start a new run directory"
                for key in refused
            )
        )


def _other_curriculum(started: Recipe, resumed: Recipe) -> str | None:
    """Why the resumed run would hand over from one teacher to the next at other steps, if it would."""
    if started.teaching.kind not in SWITCHES:
        return None
    before, after = (r.teaching.over_steps or r.steps for r in (started, resumed))
    if before == after:
        return None
    return (
        f"teaching.over_steps={resumed.teaching.over_steps} with steps={resumed.steps}: the teachers switch "
        f"over {before} steps, and --resume may not change that; add teaching.over_steps={before}"
    )
