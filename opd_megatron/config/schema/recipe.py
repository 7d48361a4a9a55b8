"""The recipe: every setting of a run, in sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_megatron.config.schema.fields import choice, number
from opd_megatron.config.schema.learner import BatchConfig, LearnerConfig, OptimizerConfig
from opd_megatron.config.schema.loss import (
    SUPERVISED_ESTIMATOR,
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.config.schema.models import RolloutConfig, StudentConfig, TeacherConfig
from opd_megatron.config.schema.running import (
    AlarmConfig,
    CheckpointConfig,
    ControllerConfig,
    DataConfig,
    EnvironmentConfig,
    EvaluationConfig,
    ObserveConfig,
    OverlapConfig,
    PreflightConfig,
    WeightSyncConfig,
)
from opd_megatron.config.schema.teaching import TeachingConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `name` equals the file name; `steps` counts optimizer steps.

    `max_staleness`: how many versions older than the weights that it trains a token may be.
    """

    name: str = ""
    summary: str = ""
    seed: int = number(0, 0, 2**31 - 1)
    device: str = choice("cuda", "cpu", "cuda")
    steps: int = number(100, 1)
    max_staleness: int = number(0, 0)
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict[str, TeacherConfig])
    teaching: TeachingConfig = field(default_factory=TeachingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def is_supervised(self) -> bool:
        """Trains on the responses of the data."""
        return self.objective.estimator == SUPERVISED_ESTIMATOR

    @property
    def max_response_tokens(self) -> int:
        """Of the longest possible sample, without its prompt: all turns and what is said between them."""
        turns = self.environment.max_turns
        between = (turns - 1) * self.environment.max_observation_tokens
        return turns * self.rollout.max_new_tokens + between

    def max_new_tokens_within(self, room: int) -> int:
        """The largest `rollout.max_new_tokens` whose longest sample has `room` tokens; 1 at least."""
        turns = self.environment.max_turns
        between = (turns - 1) * self.environment.max_observation_tokens
        return max(1, (room - self.data.max_prompt_tokens - between) // turns)

    @property
    def updates_in_flight(self) -> bool:
        """Rollout servers get new weights while they write."""
        return self.overlap.mode == "async" and self.overlap.partial_rollouts

    @property
    def uses_servers(self) -> bool:
        """Needs rollout and teacher servers: to train on rollouts, or to evaluate."""
        return not self.is_supervised or bool(self.data.heldout)

    @property
    def served_teachers(self) -> dict[str, TeacherConfig]:
        """Those that SGLang servers hold."""
        return {name: t for name, t in self.teachers.items() if t.engine == "sglang"}

    @property
    def in_process_teachers(self) -> dict[str, TeacherConfig]:
        """Those that the learner holds."""
        return {name: t for name, t in self.teachers.items() if t.engine == "in_process"}
