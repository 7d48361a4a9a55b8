"""The recipe: every setting of a run, as frozen dataclasses.

A recipe holds choices (numbers and names). It never names a cluster and never holds a secret. Derived
values (world size, samples per step, micro-batches) are properties, so an override can not leave them stale.
Rules on single fields live in their metadata (`choices`, `low`, `high`); rules between fields in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opd_megatron.config.divergences import DIVERGENCES


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
    # Tokens in the KV cache. 0: the server takes what mem_fraction_static leaves, which is for GPUs.
    max_total_tokens: int = number(0, 0)
    dtype: str = choice("bfloat16", "float32", "bfloat16", "float16")
    mem_fraction_static: float = number(0.8, 0.01, 0.98)
    start_timeout_s: float = number(300.0, 1)
    request_timeout_s: float = number(600.0, 1)
    max_retries: int = number(3, 0, 20)
    # How often a server that died is started again within one attempt; the one after that ends the attempt.
    max_restarts: int = number(3, 0, 100)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns: a Hugging Face directory (config, safetensors, tokenizer, chat template)."""

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A frozen model that scores what the student wrote.

    `engine`: `sglang` servers send log-probs of the sampled tokens and of its top-K; `in_process` is a second Megatron
    model inside the learner, on the learner's layout, whose whole vocabulary the loss may use. `offload` (in_process)
    moves its weights to host memory while it does not score.
    """

    path: str = ""
    engine: str = choice("sglang", "sglang", "in_process")
    offload: bool = False
    # Student token -> teacher token that mean the same, by their text; in the teacher's scores the two swap places.
    # For a Base student under an Instruct teacher: {"<|endoftext|>": "<|im_end|>"}.
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. Paths are relative to the recipe file. Rows: `prompt`, optional `answer`, `teacher`, `id`.

    Supervised training also needs the response: in `response`, or as the last message of `prompt`.
    """

    train: str = ""
    heldout: str = ""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    response_key: str = "response"
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


# The estimator that trains on given responses instead of the student's own.
SUPERVISED_ESTIMATOR = "cross_entropy"
SUPPORTS = (
    "teacher_topk",
    "student_topk",
    "union",
    "intersection",
    "symmetric_difference",
    "teacher_topk_plus_sampled",
    "full",
)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised. `reverse_kl` = KL(student || teacher), in words: student against teacher.

    `estimator` says how: from the sampled token (`policy_gradient` and the value forms), or from a set of
    tokens at every position (`support_matching`, `topk_surrogate`). `cross_entropy` is supervised training, on the
    responses of the data: no rollouts, no teacher. `opd objectives` lists what exists, what is proven and what needs
    `allow_biased`.
    """

    divergence: str = choice("reverse_kl", *DIVERGENCES)
    estimator: str = choice(
        "policy_gradient",
        "policy_gradient",
        "value_as_advantage",
        "k2_as_advantage",
        "k3_as_advantage",
        "k2_differentiated",
        "k3_differentiated",
        "support_matching",
        "topk_surrogate",
        SUPERVISED_ESTIMATOR,
    )
    # Of the two support estimators: which tokens, how many of each side, what happens to the mass outside.
    support: str = choice("teacher_topk", *SUPPORTS)
    topk: int = number(64, 1)
    measure: str = choice("tail_bucket", "tail_bucket", "renormalized", "raw", "generalized")
    # Find the student's own top-K too, to report how much of the teacher's it shares.
    report_overlap: bool = False
    # Of `topk_surrogate`.
    token_weights: str = choice("student_p", "student_p", "teacher_p", "none")
    # Of the teacher in the mixture of `jsd`; between 0 and 1, both excluded.
    jsd_teacher_weight: float = number(0.5, 0.0, 1.0)
    # Order of `alpha` and `tsallis`; above 0 and not 1.
    alpha: float = number(0.5, 0.0, 2.0)
    # Multiplies the distillation term: the KL coefficient of RL + OPD.
    coefficient: float = number(1.0, 0.0)
    entropy_bonus: float = number(0.0, 0.0)
    # 0: every position descends its own divergence. 1: the divergence of whole responses.
    discount: float = number(0.0, 0.0, 1.0)
    normalization: str = choice("token_mean", "token_mean", "sequence_mean")
    # Special tokens of the tokenizer that do not train: none, all, or all but those that end a response.
    mask_special_tokens: str = choice("none", "none", "all", "all_but_end")
    # PPO bounds around 1; they act from the second update on a batch (batch.updates_per_step > 1).
    clip_low: float = number(0.2, 0.0, 1.0)
    clip_high: float = number(0.2, 0.0)
    allow_biased: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task reward beside the distillation term: `coefficient` times the advantage of a graded response.

    0 is pure distillation. `grader` is one of the evaluation's graders; the prompts need an `answer`.
    """

    coefficient: float = number(0.0, 0.0)
    grader: str = "exact_match"


@dataclass(frozen=True, kw_only=True)
class WhiteningConfig:
    """Zero mean and unit variance within a scope, and of which term.

    `of`: `task` whitens the task advantage alone (group: as GRPO does); `distillation` the distillation term alone;
    `sum` both together. The last two take away the mean of the distillation term, which is the divergence that is
    to go down, and need `objective.allow_biased`.
    """

    scope: str = choice("none", "none", "sample", "group", "batch")
    of: str = choice("task", "task", "distillation", "sum")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Train only on tokens whose score lies in [low, high) percent of the step's tokens; 100 has no upper bound.

    Scores: `kl` (log pi - log q of the sampled token), `student_entropy`, `teacher_entropy` (of the teacher's
    top-K with the rest as one entry: a lower bound).
    """

    score: str = choice("none", "none", "kl", "student_entropy", "teacher_entropy")
    low: float = number(0.0, 0.0, 100.0)
    high: float = number(100.0, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight between the rollout engine and the learner, for the same weights.

    `masked` (IcePop): tokens whose ratio leaves [low, high] get weight 0; `truncated`: the ratio is clipped;
    `none`: weight 1. `level`: the ratio of the token, of its whole response, or their geometric mean.
    """

    kind: str = choice("masked", "none", "masked", "truncated")
    level: str = choice("token", "token", "sequence", "geometric_mean")
    low: float = number(0.5, 0.0)
    high: float = number(2.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. The learning rate's formula is in megatron/schedule.py; `decay_steps` 0 means the run's `steps`."""

    lr: float = number(1e-6, 0.0, 1.0)
    beta1: float = number(0.9, 0.0, 1.0)
    beta2: float = number(0.95, 0.0, 1.0)
    eps: float = number(1e-8, 0.0)
    weight_decay: float = number(0.0, 0.0)
    clip_grad: float = number(1.0, 0.0)
    schedule: str = choice("constant", "constant", "linear", "cosine")
    warmup_steps: int = number(0, 0)
    decay_steps: int = number(0, 0)
    min_lr: float = number(0.0, 0.0, 1.0)
    max_bad_steps: int = number(3, 1)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Three words for batch size; the rest is derived."""

    prompts_per_step: int = number(32, 1)
    rollouts_per_prompt: int = number(4, 1)
    tokens_per_microbatch: int = number(4096, 8)
    # Optimizer updates on every step batch, each on the whole of it.
    updates_per_step: int = number(1, 1, 64)

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The Megatron-Core world."""

    tensor_parallel: int = number(1, 1)
    pipeline_parallel: int = number(1, 1)
    # Model chunks per pipeline stage; above 1 the schedule is interleaved 1F1B.
    virtual_pipeline: int = number(1, 1)
    context_parallel: int = number(1, 1)
    data_parallel: int = number(1, 1)
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    # How the loss meets the vocabulary (megatron/output_head.py), and what computes its rows.
    loss_mode: str = choice("in_place", "stored", "in_place", "chunked", "recompute")
    loss_backend: str = choice("auto", "auto", "torch", "compiled", "triton")
    # fp8: the linear layers of transformer blocks, through Transformer Engine; the head stays in bf16.
    precision: str = choice("bf16", "fp32", "bf16", "fp8")
    fp8_recipe: str = choice("current", "delayed", "current", "blockwise", "mxfp8")
    fp8_bf16_first_layers: int = number(0, 0)
    fp8_bf16_last_layers: int = number(0, 0)
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
class ControllerConfig:
    """The controller process. `hang_timeout_s`: how long its heartbeat may stand still before the run is ended."""

    hang_timeout_s: float = number(300.0, 1)


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
    """When commits are made and how many stay.

    `async_save`: training goes on while the files are written, from a copy in host memory (each rank's weights and
    optimizer state once more).
    """

    every: int = number(50, 1)
    keep: int = number(2, 2)
    async_save: bool = False


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
