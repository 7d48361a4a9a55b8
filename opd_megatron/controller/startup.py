"""Checks before step one, printed: do the two engines agree, and is a teacher equal to the student at distance zero?

1. The learner's weights are published and pushed, so every server provably holds version `v`.
2. Rollouts of a few prompts: log-probs of the rollout server (decoding) against the learner's, same weights.
   Beyond the tolerance the importance weights, and so the loss, would be wrong: the run is refused.
3. The same rollouts scored by prefill on the rollout server, as if it were the teacher: the k1 estimate of
   KL(student || teacher) and the largest difference must be about 0. This is the whole teacher path: alignment of
   ids, temperature, parsing.
4. The same rollouts under every teacher inside the learner: no score is NaN, and one with the student's own files
   is at distance 0 from a student that has not trained yet.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from opd_megatron.config.schema import Recipe
from opd_megatron.controller.generation import generate_group, sampling_of
from opd_megatron.controller.in_process import LearnerTeachers, mean
from opd_megatron.controller.publishing import Publisher
from opd_megatron.controller.roles import Roles
from opd_megatron.data.prompts import PromptSet
from opd_megatron.errors import NumericsError
from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.observe.console import RunConsole
from opd_megatron.rundir import AttemptDir
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.types import Rollout, Sample, TeacherScores

_PROBES = 2


async def check_numerics(
    recipe: Recipe,
    roles: Roles,
    publisher: Publisher,
    train: PromptSet,
    attempt: AttemptDir,
    version: int,
    console: RunConsole,
) -> None:
    """Bring the servers to `version`, then run the checks of the module docstring.

    Raises:
        NumericsError: the engines disagree beyond `preflight.logprob_tolerance_nats`.
    """
    prompts = train.prompts[: recipe.preflight.samples]
    publisher.probes = [prompt.token_ids for prompt in prompts[:_PROBES]]
    delta = await publisher.push(await publisher.publish(version))
    console.say(
        f"check: rollout servers hold weights v{version}, probe log-probs within {delta:.1e} nats"
    )
    groups = await asyncio.gather(
        *(
            generate_group(
                roles.rollout,
                prompt,
                sampling_of(recipe.rollout),
                [f"preflight-{number}"],
                0,
            )
            for number, prompt in enumerate(prompts)
        )
    )
    rollouts = [rollout for group in groups for rollout in group]
    # From here on probes are whole samples: decoding and prefill positions both.
    publisher.probes = [r.prompt_ids + r.response_ids for r in rollouts[:_PROBES]]
    scores = await _as_teacher(roles, rollouts)
    learner = await _learner_logprobs(roles, rollouts, scores, attempt, version)
    tolerance = recipe.preflight.logprob_tolerance_nats
    _compare("learner against rollout server", learner, _behavior(rollouts), tolerance, console)
    teacher = np.concatenate([score.sampled_logprobs for score in scores])
    if recipe.rollout.temperature == 1.0:
        _compare("student as its own teacher", learner, teacher, tolerance, console)
    inside = LearnerTeachers(roles.learner, attempt.batches)
    for name in recipe.in_process_teachers:
        await _check_inside(recipe, name, inside, rollouts, version, console)


async def _check_inside(
    recipe: Recipe,
    name: str,
    inside: LearnerTeachers,
    rollouts: list[Rollout],
    version: int,
    console: RunConsole,
) -> None:
    """A teacher inside the learner, on the rollouts of the checks.

    Raises:
        NumericsError: a score is NaN, or the student's own weights are not at distance 0.
    """
    values = await inside.compare(name, rollouts)
    reverse, forward = mean(values["kl_reverse"]), mean(values["kl_forward"])
    num_tokens = len(values["kl_reverse"])
    console.say(
        f"check: teacher {name} inside the learner: KL(student || teacher) {reverse:.3g}, "
        f"KL(teacher || student) {forward:.3g} nats over {num_tokens} tokens"
    )
    for what, values_N in values.items():
        if np.isnan(values_N).any():
            raise NumericsError(
                f"teachers.{name}={recipe.teachers[name].path!r}: {what} is NaN on the rollouts of the "
                f"checks; look at its weights and at learner.precision"
            )
    teacher = recipe.teachers[name]
    same_files = Path(teacher.path).resolve() == Path(recipe.student.path).resolve()
    if same_files and version == 0 and not teacher.aliases:
        tolerance = recipe.preflight.logprob_tolerance_nats
        student, theirs = values["student_logprobs"], values["teacher_logprobs"]
        _compare(f"student as its own teacher {name}", student, theirs, tolerance, console)


async def _as_teacher(roles: Roles, rollouts: list[Rollout]) -> list[TeacherScores]:
    """The rollout servers asked the way a teacher is asked."""
    return await score_rollouts({"self": roles.rollout}, rollouts, ["self"] * len(rollouts))


def _behavior(rollouts: list[Rollout]) -> np.ndarray:
    return np.concatenate([rollout.behavior_logprobs for rollout in rollouts])


async def _learner_logprobs(
    roles: Roles,
    rollouts: list[Rollout],
    scores: list[TeacherScores],
    attempt: AttemptDir,
    version: int,
) -> np.ndarray:
    """[sum L] log-probs of the sampled tokens by the learner, at the rollout temperature."""
    samples = [Sample(r, s) for r, s in zip(rollouts, scores, strict=True)]
    batch: Path = attempt.batches / "preflight.safetensors"
    out: Path = attempt.batches / "preflight.tokens.safetensors"
    write_batch(batch, version + 1, version, samples)
    await roles.learner.ask("score", batch=str(batch), out=str(out))
    return load_file(out)["student_logprobs"]


def _compare(
    what: str, learner: np.ndarray, other: np.ndarray, tolerance: float, console: RunConsole
) -> None:
    difference = learner.astype(np.float64) - other.astype(np.float64)
    largest, mean = float(np.abs(difference).max()), float(difference.mean())
    console.say(
        f"check: {what}: max |delta| {largest:.1e} nats over {len(difference)} tokens, "
        f"KL estimate {mean:+.1e} (limit {tolerance:g})"
    )
    if not largest <= tolerance:
        raise NumericsError(
            f"{what}: log-probs of the same weights differ by {largest:.3g} nats, more than "
            f"preflight.logprob_tolerance_nats={tolerance:g}; compare dtype, temperature and model "
            f"configuration of the two engines, or raise the tolerance for a lower precision"
        )
