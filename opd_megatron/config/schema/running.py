"""Sections of what happens around the learning: data in, overlap, weights out, evaluation, commits, checks, display."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.schema.fields import choice, number


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. Paths are relative to the recipe file. Rows: `prompt`, optional `answer`, `teacher`, `domain`, `id`.

    `thinking`: which mode the student's chat template is asked for; `template` leaves it to the template.
    Supervised training also needs the response: in `response`, or as the last message of `prompt`.
    """

    train: str = ""
    heldout: str = ""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    response_key: str = "response"
    thinking: str = choice("template", "template", "always", "never")
    max_prompt_tokens: int = number(1024, 1)
    max_bad_rows_frac: float = number(0.01, 0.0, 1.0)
    shuffle: bool = True
    # Deal the domains of the rows in turn, so that each has an equal share of every step.
    alternate_domains: bool = False


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Who answers the student in training; `none`: nobody, a response is one turn.

    `try_again` asks the question again until `grader` calls the answer right. An episode has `max_turns` of the
    student at most; what the environment says at a time has `max_observation_tokens` at most, its tokens do not train.
    """

    name: str = choice("none", "none", "try_again")
    grader: str = "exact_match"
    max_turns: int = number(1, 1)
    max_observation_tokens: int = number(64, 1)


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Whether the student writes while the learner trains; how old a sample may be then says `max_staleness`.

    `sync`: no, a step trains what its own weights wrote. `one_step_off`: the rollouts of a step are written while the
    step before it trains, and weights change between two steps' rollouts. `async`: rollouts are written all the time,
    as many as the bound allows. `partial_rollouts` (async): new weights do not wait for the rollouts under way, which
    go on with them; every token keeps the version that wrote it.
    """

    mode: str = choice("sync", "sync", "one_step_off", "async")
    partial_rollouts: bool = True


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The controller process. `hang_timeout_s`: how long its heartbeat may stand still before the run is ended."""

    hang_timeout_s: float = number(300.0, 1)


@dataclass(frozen=True, kw_only=True)
class WeightSyncConfig:
    """How new weights reach the rollout servers, and how it is proven that they did.

    `disk`: a directory that the servers load; its newest `keep_versions` stay. `broadcast`: a process group of the
    learner's rank 0 and every server, in buckets of `bucket_mib`. `timeout_s`: for each server's part of an update.
    """

    route: str = choice("disk", "disk", "broadcast")
    keep_versions: int = number(2, 1)
    bucket_mib: int = number(512, 1)
    verify_tolerance_nats: float = number(1e-3, 0.0)
    timeout_s: float = number(300.0, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: mean@n accuracy at its own temperature, and the KL to the teachers.

    `teacher`: the one that the series without a teacher's name are of, and under whose control text the student
    answers for them; empty: the first.
    """

    grader: str = "exact_match"
    every: int = number(0, 0)
    problems: int = number(128, 1)
    samples_per_problem: int = number(8, 1)
    temperature: float = number(1.0, 0.0, 10.0)
    top_p: float = number(1.0, 0.01, 1.0)
    top_k: int = number(-1, -1)
    min_p: float = number(0.0, 0.0, 1.0)
    kl_problems: int = number(64, 0)
    teacher: str = ""


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
class AlarmConfig:
    """What is done when too many rollouts of the last `window` steps never stop, or repeat themselves at their end."""

    truncation: str = choice("warn", "warn", "stop", "none")
    repetition: str = choice("warn", "warn", "stop", "none")
    max_truncated_frac: float = number(0.8, 0.0, 1.0)
    max_repetitive_frac: float = number(0.3, 0.0, 1.0)
    window: int = number(5, 1)


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Checks before step one, and `opd probe`: `probe_rollouts` of each of `probe_prompts`, overlap of `probe_topk`."""

    logprob_tolerance_nats: float = number(1e-3, 0.0)
    samples: int = number(8, 1)
    probe_prompts: int = number(16, 1)
    probe_rollouts: int = number(4, 1)
    probe_topk: int = number(16, 1)


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What is shown while the run goes on."""

    show_rollout_every: int = number(20, 0)
    report_rollouts: int = number(10, 0)
