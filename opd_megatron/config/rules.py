"""Rules a recipe must keep, checked before anything is started. No torch, no files except by name.

Single-field rules come from the field metadata of `schema`; rules between fields are the functions below.
Every violation is collected, so a user fixes them in one go.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, cast

from opd_megatron.config.learner_rules import learner_problems
from opd_megatron.config.schema import Recipe, ServerConfig
from opd_megatron.config.teaching_rules import teaching_problems
from opd_megatron.errors import ConfigError, did_you_mean

# What data/tokenizer_form.py compares; a test holds both equal.
ACCEPTED_FORMS = ("special_tokens", "segmentation", "chat_template")
# SGLang's limit of a returned sampling mask is 4096 tokens; the rest is room for ties at the cutoff.
MAX_KEPT_TOKENS = 4000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _field_problems(section: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _field_problems(value, f"{key}.")
        elif isinstance(value, dict):
            for name, child in cast(dict[str, Any], value).items():
                if dataclasses.is_dataclass(child):
                    yield from _field_problems(child, f"{key}.{name}.")
        else:
            yield from _value_problems(key, value, field.metadata)


def _value_problems(key: str, value: Any, metadata: Any) -> Iterator[str]:
    choices = metadata.get("choices")
    if choices and value not in choices:
        suggestion = did_you_mean(str(value), choices)
        yield f"{key}={value!r}: no such choice{suggestion}; use one of: {', '.join(choices)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if value != value or value in (float("inf"), float("-inf")):
        yield f"{key}={value!r}: must be finite; give a number"
        return
    low, high = metadata.get("low"), metadata.get("high")
    if low is not None and value < low:
        yield f"{key}={value!r}: must be at least {low}; raise it"
    if high is not None and value > high:
        yield f"{key}={value!r}: must be at most {high}; lower it"


def _required(recipe: Recipe) -> Iterator[str]:
    if not _NAME.fullmatch(recipe.name):
        yield f"name={recipe.name!r}: must match {_NAME.pattern}; rename the recipe file"
    if not recipe.student.path:
        yield "student.path='': must name a Hugging Face model directory; set student.path=DIR"
    if not recipe.data.train:
        yield "data.train='': must name a JSONL or parquet file; set data.train=FILE"
    if not recipe.teachers and not recipe.is_supervised:
        yield "teachers={}: at least one teacher is needed; set teachers.main.path=DIR"
    for name, teacher in recipe.teachers.items():
        if not _NAME.fullmatch(name):
            yield f"teachers.{name}: teacher names must match {_NAME.pattern}; rename it"
        if not teacher.path:
            yield f"teachers.{name}.path='': must name a model directory; set teachers.{name}.path=DIR"
        for form in teacher.accept:
            if form not in ACCEPTED_FORMS:
                yield (
                    f"teachers.{name}.accept={teacher.accept}: no such difference {form!r}"
                    f"{did_you_mean(form, ACCEPTED_FORMS)}; use some of: {', '.join(ACCEPTED_FORMS)}"
                )
        if teacher.offload and teacher.engine != "in_process":
            yield (
                f"teachers.{name}.offload=True: teachers.{name}.engine={teacher.engine!r} keeps no weights in the "
                f"learner; set it to false, or teachers.{name}.engine=in_process"
            )


def _lengths(recipe: Recipe) -> Iterator[str]:
    longest = recipe.data.max_prompt_tokens + recipe.max_response_tokens
    servers: dict[str, ServerConfig] = {}
    if recipe.uses_servers:
        servers["rollout.server"] = recipe.rollout.server
        served = recipe.served_teachers.items()
        servers |= {f"teachers.{name}.server": teacher.server for name, teacher in served}
    for key, server in servers.items():
        if server.max_total_tokens == 0 and recipe.device == "cpu":
            yield (
                f"{key}.max_total_tokens=0: on a CPU the cache would take the machine's memory; "
                f"set it, e.g. {key}.max_total_tokens=16384"
            )
        elif 0 < server.max_total_tokens < longest:
            yield (
                f"{key}.max_total_tokens={server.max_total_tokens}: the longest possible sample has "
                f"{longest} tokens; raise it to at least {longest}, or 0 on a GPU"
            )
        # SGLang reserves one position for the token after the last one.
        room = server.context_length - 1
        if longest > room:
            yield (
                f"data.max_prompt_tokens={recipe.data.max_prompt_tokens} + {_response_words(recipe)} exceeds "
                f"{key}.context_length={server.context_length} - 1; lower rollout.max_new_tokens to "
                f"{recipe.max_new_tokens_within(room)} or raise {key}.context_length"
            )
    if longest > recipe.batch.tokens_per_microbatch:
        yield (
            f"batch.tokens_per_microbatch={recipe.batch.tokens_per_microbatch}: the longest possible "
            f"sample has {longest} tokens (data.max_prompt_tokens + {_response_words(recipe)}); raise it to "
            f"at least {longest}"
        )


def _response_words(recipe: Recipe) -> str:
    """How `max_response_tokens` comes about."""
    words = f"rollout.max_new_tokens={recipe.rollout.max_new_tokens}"
    turns, between = recipe.environment.max_turns, recipe.environment.max_observation_tokens
    if turns == 1:
        return words
    return (
        f"{turns} times {words} and {turns - 1} times environment.max_observation_tokens={between}"
    )


def _objective(recipe: Recipe) -> Iterator[str]:
    correction = recipe.correction
    if correction.kind != "none" and not correction.low <= 1.0 <= correction.high:
        yield (
            f"correction.low={correction.low}, correction.high={correction.high}: the window must "
            f"contain 1, the ratio of identical policies; e.g. [0.5, 2.0]"
        )


def _sampling(recipe: Recipe) -> Iterator[str]:
    rollout, evaluation = recipe.rollout, recipe.evaluation
    for key, top_k in (("rollout", rollout.top_k), ("evaluation", evaluation.top_k)):
        if top_k in (0, 1):
            yield (
                f"{key}.top_k={top_k}: must be -1 (no limit) or at least 2; "
                + (
                    "greedy evaluation is evaluation.temperature=0"
                    if key == "evaluation"
                    else "set -1"
                )
            )
    if recipe.is_supervised or not rollout.truncates:
        return
    if rollout.top_k == -1 or rollout.top_k > MAX_KEPT_TOKENS:
        yield (
            f"rollout.top_k={rollout.top_k}: a rollout server states what truncation (rollout.top_p={rollout.top_p}, "
            f"rollout.min_p={rollout.min_p}) kept only for a finite top_k of at most {MAX_KEPT_TOKENS}, and without it "
            f"the importance weight would be wrong; set e.g. rollout.top_k=1024, or switch truncation off"
        )


# Those for which a rollout must bring the student's own top-K along; an intersection is made in the learner.
_LISTED_SUPPORTS = ("student_topk", "union", "symmetric_difference")


def _has_support(recipe: Recipe) -> bool:
    return recipe.objective.estimator in ("support_matching", "topk_surrogate")


def _environment(recipe: Recipe) -> Iterator[str]:
    environment = recipe.environment
    if environment.name == "none":
        if environment.max_turns > 1:
            yield (
                f"environment.max_turns={environment.max_turns}: environment.name='none' answers nobody; set "
                f"environment.name, or environment.max_turns=1"
            )
        return
    if recipe.is_supervised:
        yield (
            f"environment.name={environment.name!r}: objective.estimator=cross_entropy trains on given responses; set "
            f"environment.name=none"
        )
    support = recipe.objective.support
    if recipe.served_teachers and support in _LISTED_SUPPORTS and _has_support(recipe):
        yield (
            f"objective.support={support!r}: the student's own top-K comes with a rollout of one turn, not with a "
            f"conversation (environment.name={environment.name!r}); take teacher_topk, or teachers in process"
        )
    for name, teacher in recipe.teachers.items():
        if teacher.aliases:
            yield (
                f"teachers.{name}.aliases={teacher.aliases}: an alias stands for the end of a response, and a "
                f"conversation (environment.name={environment.name!r}) has an end a turn; leave the aliases out"
            )


def _overlap(recipe: Recipe) -> Iterator[str]:
    mode, staleness = recipe.overlap.mode, recipe.max_staleness
    if mode == "sync" and staleness > 0:
        yield (
            f"max_staleness={staleness}: overlap.mode='sync' trains what its own weights wrote; set max_staleness=0, "
            f"or overlap.mode to one_step_off or async"
        )
    if mode == "one_step_off" and staleness != 1:
        yield (
            f"max_staleness={staleness}: with overlap.mode='one_step_off' every sample but those of the first step is "
            f"one version old; set max_staleness=1"
        )
    if mode == "async" and staleness == 0:
        yield (
            "max_staleness=0: overlap.mode='async' writes rollouts while older ones train, so they are at least one "
            "version old; set max_staleness to 1 or more"
        )
    if mode != "async" and not recipe.overlap.partial_rollouts:
        yield (
            f"overlap.partial_rollouts=False: with overlap.mode={mode!r} no rollout is under way when weights change; "
            f"leave it out or set overlap.mode=async"
        )
    if mode == "sync":
        return
    if recipe.is_supervised:
        yield (
            f"overlap.mode={mode!r}: objective.estimator=cross_entropy trains on given responses, there is nothing to "
            f"write meanwhile; set overlap.mode=sync"
        )
    elif recipe.correction.kind == "none" and not recipe.objective.allow_biased:
        yield (
            f"correction.kind='none': with overlap.mode={mode!r} other weights than the trained ones wrote the "
            f"samples, and without an importance weight the gradient is biased; set correction.kind=masked or "
            f"truncated, or objective.allow_biased=true"
        )


def _supervised(recipe: Recipe) -> Iterator[str]:
    """Settings of rollouts, which supervised training does not have; those of the loss: losses/combinations.py."""
    if not recipe.is_supervised:
        return
    if recipe.batch.rollouts_per_prompt != 1:
        yield (
            f"batch.rollouts_per_prompt={recipe.batch.rollouts_per_prompt}: objective.estimator=cross_entropy has one "
            f"response a row, the given one; set batch.rollouts_per_prompt=1"
        )
    if recipe.rollout.temperature != 1.0:
        yield (
            f"rollout.temperature={recipe.rollout.temperature}: cross-entropy on given responses is at temperature 1; "
            f"set rollout.temperature=1.0 (evaluation.temperature is separate)"
        )
    if recipe.rollout.truncates:
        yield (
            "rollout.top_p, rollout.top_k, rollout.min_p: objective.estimator=cross_entropy samples nothing; set "
            "rollout.top_p=1.0 rollout.top_k=-1 rollout.min_p=0.0 (those of the evaluation are separate)"
        )
    if recipe.teachers and not recipe.data.heldout:
        yield (
            f"teachers={list(recipe.teachers)}: with objective.estimator=cross_entropy a teacher serves the evaluation "
            f"alone, and data.heldout='' is none; set data.heldout=FILE or leave the teachers out"
        )


def _weight_sync(recipe: Recipe) -> Iterator[str]:
    sync, limit = recipe.weight_sync, recipe.learner.step_timeout_s
    if sync.route == "broadcast" and 2 * sync.timeout_s > limit:
        yield (
            f"weight_sync.timeout_s={sync.timeout_s:g}: the learner's ranks wait for rank 0 while it waits for the "
            f"servers, within learner.step_timeout_s={limit:g}; lower it to {limit / 2:g} or raise the other"
        )


def problems(recipe: Recipe) -> list[str]:
    """Every violated rule, as one line each: key, value seen, rule, fix."""
    found = list(_field_problems(recipe, ""))
    rules = (
        _required,
        _lengths,
        learner_problems,
        _objective,
        _sampling,
        _overlap,
        _environment,
        _supervised,
        _weight_sync,
    )
    for rule in rules:
        found.extend(rule(recipe))
    found.extend(teaching_problems(recipe))
    return found


def check(recipe: Recipe) -> None:
    """Raise on the first call with every problem listed.

    Raises:
        ConfigError: one line per violated rule.
    """
    found = problems(recipe)
    if found:
        raise ConfigError("\n".join(found))
