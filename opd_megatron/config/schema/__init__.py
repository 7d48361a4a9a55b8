"""The recipe: every setting of a run, as frozen dataclasses.

A recipe holds choices (numbers and names). It never names a cluster and never holds a secret. Derived
values (world size, samples per step, micro-batches) are properties, so an override can not leave them stale.
Rules on single fields live in their metadata (`choices`, `low`, `high`); rules between fields in `rules.py`.
"""

from opd_megatron.config.schema.learner import BatchConfig, LearnerConfig, OptimizerConfig
from opd_megatron.config.schema.loss import (
    SUPERVISED_ESTIMATOR,
    SUPPORTS,
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    TaskConfig,
    WhiteningConfig,
)
from opd_megatron.config.schema.models import (
    RolloutConfig,
    ServerConfig,
    StudentConfig,
    TeacherConfig,
)
from opd_megatron.config.schema.recipe import Recipe
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
from opd_megatron.config.schema.teaching import DRAWS, MAX_MEMBERS, MEANS, SWITCHES, TeachingConfig

__all__ = [
    "DRAWS",
    "MAX_MEMBERS",
    "MEANS",
    "SUPERVISED_ESTIMATOR",
    "SUPPORTS",
    "SWITCHES",
    "AlarmConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ControllerConfig",
    "CorrectionConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FilterConfig",
    "LearnerConfig",
    "ObjectiveConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "OverlapConfig",
    "PreflightConfig",
    "Recipe",
    "RolloutConfig",
    "ServerConfig",
    "StudentConfig",
    "TaskConfig",
    "TeacherConfig",
    "TeachingConfig",
    "WeightSyncConfig",
    "WhiteningConfig",
]
