"""Where the time of a run went, by stage of the step.

    perf/step_s = rollout + teacher + learner + publish + sync + checkpoint + other

Model work is the first three. Evaluation runs between steps and is shown beside the total, not in
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_megatron.observe.jsonl import Row


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. `model_work` says whether a model computes in it."""

    metric: str
    label: str
    color: str
    model_work: bool


# Model work in full colours, the rest in greys: the eye sees at once how much is overhead.
STAGES = (
    Stage("perf/rollout_s", "rollout", "#2b6cb0", True),
    Stage("perf/teacher_s", "teacher", "#2f855a", True),
    Stage("perf/learner_s", "learner", "#d9730d", True),
    Stage("perf/publish_s", "publish", "#6b7280", False),
    Stage("perf/sync_s", "sync", "#939aa6", False),
    Stage("perf/checkpoint_s", "checkpoint", "#b6bcc6", False),
    Stage("perf/other_s", "other", "#d7dbe1", False),
)


@dataclass(frozen=True, slots=True)
class StageTime:
    """`mean_s` per step, `share` of the step time, `total_s` over the recorded steps."""

    stage: Stage
    mean_s: float
    share: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TimeAccount:
    """Times over the steps that recorded `perf/step_s`."""

    steps: int
    mean_step_s: float
    total_s: float
    stages: tuple[StageTime, ...]
    outside_model_frac: float
    evaluation_s: float


def account_time(rows: Sequence[Row]) -> TimeAccount | None:
    """Add up the stages; None when no step recorded its time."""
    timed = [row for row in rows if row.get("perf/step_s", 0) > 0]
    if not timed:
        return None
    total_s = sum(row["perf/step_s"] for row in timed)
    times = []
    for stage in STAGES:
        if any(stage.metric in row for row in timed):
            stage_s = sum(row.get(stage.metric, 0.0) for row in timed)
            times.append(StageTime(stage, stage_s / len(timed), stage_s / total_s, stage_s))
    return TimeAccount(
        steps=len(timed),
        mean_step_s=total_s / len(timed),
        total_s=total_s,
        stages=tuple(times),
        outside_model_frac=1 - sum(time.share for time in times if time.stage.model_work),
        evaluation_s=sum(row.get("perf/eval_s", 0.0) for row in rows),
    )
