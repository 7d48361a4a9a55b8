"""What benchmarks/planner.py runs. No torch."""

from __future__ import annotations

from dataclasses import dataclass

_QUICK = ("steps=5", "evaluation.every=0", "evaluation.kl_problems=4", "evaluation.problems=16",
          "evaluation.samples_per_problem=1", "observe.show_rollout_every=0")  # fmt: skip


@dataclass(frozen=True)
class RunCase:
    """A run of the demo with overrides."""

    name: str
    changes: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*_QUICK, *self.changes)


def _batch(prompts: int, rollouts: int) -> tuple[str, ...]:
    return (f"batch.prompts_per_step={prompts}", f"batch.rollouts_per_prompt={rollouts}")


# The two runs that describe the machine: the largest and the smallest step.
CALIBRATION = (RunCase("128 x 4", _batch(128, 4)), RunCase("16 x 2", _batch(16, 2)))
RUNS = (
    RunCase("64 x 4"),
    RunCase("32 x 4", _batch(32, 4)),
    RunCase("64 x 8", _batch(64, 8)),
    RunCase("64 x 4, at most 9 tokens", ("rollout.max_new_tokens=9",)),
    RunCase("64 x 4, 2 rollout servers", ("rollout.server.num_servers=2",)),
    RunCase("32 x 8, teacher top 8", (*_batch(32, 8), "objective.estimator=support_matching",
                                      "objective.topk=8", "correction.kind=none")),
    RunCase("64 x 4, DP 2", ("learner.tensor_parallel=1", "learner.data_parallel=2")),
    RunCase("48 x 4, 1 rank", (*_batch(48, 4), "learner.tensor_parallel=1")),
)  # fmt: skip
