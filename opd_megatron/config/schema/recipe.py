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
    EvaluationConfig,
    ObserveConfig,
    PreflightConfig,
    WeightSyncConfig,
)
from opd_megatron.config.schema.teaching import TeachingConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `name` equals the file name; `steps` counts optimizer steps; `max_staleness` is in versions."""

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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
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
