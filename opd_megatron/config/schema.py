"""The recipe: every setting of a run, as frozen dataclasses.

A recipe holds choices (numbers and names). It never names a cluster and never holds a secret. Derived
values (world size, samples per step, micro-batches) are properties, so an override can not leave them stale.
Rules on single fields live in their metadata (`choices`, `low`, `high`); rules between fields in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def choice(default: str, *names: str) -> Any:
    """A string field limited to `names`."""
    return field(default=default, metadata={"choices": names})


def number(default: float | int, low: float | None = None, high: float | None = None) -> Any:
    """A numeric field with inclusive bounds."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the SGLang servers of one role are launched."""

    num_servers: int = number(1, 1)
    tensor_parallel: int = number(1, 1)
    context_length: int = number(4096, 8)
    max_total_tokens: int = number(65536, 64)
    dtype: str = choice("bfloat16", "float32", "bfloat16", "float16")
    mem_fraction_static: float = number(0.8, 0.01, 0.98)
    start_timeout_s: float = number(300.0, 1)
    request_timeout_s: float = number(600.0, 1)
    max_retries: int = number(3, 0, 20)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns: a Hugging Face directory (config, safetensors, tokenizer, chat template)."""

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A frozen model that scores what the student wrote."""

    path: str = ""
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. Paths are relative to the recipe file. Rows: `prompt`, optional `answer`, `teacher`, `id`."""

    train: str = ""
    heldout: str = ""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    max_prompt_tokens: int = number(1024, 1)
    max_bad_rows_frac: float = number(0.01, 0.0, 1.0)
    shuffle: bool = True


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student generates. Log-probs in the loss are at this temperature."""

    temperature: float = number(1.0, 0.01, 10.0)
    top_p: float = number(1.0, 0.01, 1.0)
    top_k: int = number(-1, -1)
    max_new_tokens: int = number(1024, 1)
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised. `reverse_kl` = KL(student || teacher), in words: student against teacher.

    Which (divergence, estimator) pairs are proven and which need `allow_biased`: docs/losses.md.
    """

    divergence: str = choice(
        "reverse_kl",
        "reverse_kl",
        "forward_kl",
        "jsd",
        "squared_hellinger",
        "alpha",
        "tsallis",
        "chi2",
        "total_variation",
    )
    estimator: str = choice(
        "policy_gradient",
        "policy_gradient",
        "value_as_advantage",
        "k2_as_advantage",
        "k3_as_advantage",
        "k2_differentiated",
        "k3_differentiated",
    )
    # Of the teacher in the mixture of `jsd`; between 0 and 1, both excluded.
    jsd_teacher_weight: float = number(0.5, 0.0, 1.0)
    # Order of `alpha` and `tsallis`; above 0 and not 1.
    alpha: float = number(0.5, 0.0, 2.0)
    entropy_bonus: float = number(0.0, 0.0)
    discount: float = number(0.0, 0.0, 1.0)
    allow_biased: bool = False


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight between the rollout engine and the learner, for the same weights.

    `masked` (IcePop): tokens whose ratio leaves [low, high] get weight 0; `truncated`: the ratio is clipped;
    `none`: weight 1.
    """

    kind: str = choice("masked", "none", "masked", "truncated")
    low: float = number(0.5, 0.0)
    high: float = number(2.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = number(1e-6, 0.0, 1.0)
    beta1: float = number(0.9, 0.0, 1.0)
    beta2: float = number(0.95, 0.0, 1.0)
    eps: float = number(1e-8, 0.0)
    weight_decay: float = number(0.0, 0.0)
    clip_grad: float = number(1.0, 0.0)
    schedule: str = choice("constant", "constant")
    max_bad_steps: int = number(3, 1)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Three words for batch size; the rest is derived."""

    prompts_per_step: int = number(32, 1)
    rollouts_per_prompt: int = number(4, 1)
    tokens_per_microbatch: int = number(4096, 8)

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The Megatron-Core world."""

    tensor_parallel: int = number(1, 1)
    pipeline_parallel: int = number(1, 1)
    context_parallel: int = number(1, 1)
    data_parallel: int = number(1, 1)
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    precision: str = choice("bf16", "fp32", "bf16")
    start_timeout_s: float = number(300.0, 1)
    step_timeout_s: float = number(1800.0, 1)

    @property
    def world_size(self) -> int:
        return (
            self.tensor_parallel
            * self.pipeline_parallel
            * self.context_parallel
            * self.data_parallel
        )


@dataclass(frozen=True, kw_only=True)
class WeightSyncConfig:
    """How new weights reach the rollout servers, and how it is proven that they did."""

    route: str = choice("disk", "disk")
    keep_versions: int = number(2, 1)
    verify_tolerance_nats: float = number(1e-3, 0.0)
    timeout_s: float = number(300.0, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: mean@n accuracy at its own temperature, and the KL to the teacher."""

    grader: str = "exact_match"
    every: int = number(0, 0)
    problems: int = number(128, 1)
    samples_per_problem: int = number(8, 1)
    temperature: float = number(1.0, 0.0, 10.0)
    kl_problems: int = number(64, 0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When commits are made and how many stay."""

    every: int = number(50, 1)
    keep: int = number(2, 2)


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Checks before step one."""

    logprob_tolerance_nats: float = number(1e-3, 0.0)
    samples: int = number(8, 1)


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What is shown while the run goes on."""

    show_rollout_every: int = number(20, 0)
    report_rollouts: int = number(10, 0)


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
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
