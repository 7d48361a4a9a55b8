"""When evaluation is due: held-out accuracy on the rollout servers, the KL to the teachers, the teachers' accuracy.

With several teachers every one of them is measured; `evaluation.teacher` is the one that the unmarked series are of.
With control texts the student answers once under each, and is compared with that one's teacher.
A teacher inside the learner is compared there, exactly; its accuracy is not measured.
The KL to a served teacher of a large vocabulary is estimated from sampled tokens. Where the evaluation does not sample
plainly at temperature 1, the student gives one more answer, drawn so, to each of its problems.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opd_megatron.config.schema import Recipe
from opd_megatron.controller.in_process import LearnerTeachers, mean
from opd_megatron.controller.roles import Roles
from opd_megatron.controller.teaching import control_ids_of
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.eval.evaluate import (
    MAX_EXACT_VOCAB,
    AccuracyResult,
    evaluate_accuracy,
    evaluate_kl,
    sample_rollouts,
    summarize,
)
from opd_megatron.eval.grading import Grader, check_answers, make_grader
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.types import Prompt, Rollout

_SET = "eval/heldout"


def evaluation_sampling(recipe: Recipe) -> Sampling:
    """The one definition of how an evaluation samples."""
    settings = recipe.evaluation
    return Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_new_tokens=recipe.rollout.max_new_tokens,
    )


@dataclass(frozen=True)
class _Answers:
    """Of the student, under one control text. for_kl: those that the KLs are measured on."""

    graded: AccuracyResult
    for_kl: list[Rollout]


class Evaluator:
    """Evaluates always the same problems with the same settings.

    Args:
        prompts: the held-out set; its first `evaluation.problems` are used.
        aliases: of each teacher.
        inside: the teachers inside the learner; None without a learner.
    """

    def __init__(
        self,
        recipe: Recipe,
        roles: Roles,
        tokenizer: ChatTokenizer,
        prompts: Sequence[Prompt],
        aliases: Mapping[str, TokenAliases],
        inside: LearnerTeachers | None = None,
    ) -> None:
        self.settings = recipe.evaluation
        self.grader: Grader = make_grader(recipe.evaluation.grader)
        self._roles = roles
        self._tokenizer = tokenizer
        self._problems = tuple(prompts[: self.settings.problems])
        self._for_kl = self._problems[: self.settings.kl_problems]
        check_answers(self._problems)
        self._sampling = evaluation_sampling(recipe)
        # Supervised training may do without one: there is accuracy then, and no KL.
        self._teacher = recipe.evaluation.teacher or next(iter(recipe.teachers), "")
        self._teachers = [self._teacher] if self._teacher else []
        self._teachers += [name for name in recipe.teachers if name != self._teacher]
        self._aliases = aliases
        self._served = set(recipe.served_teachers)
        self._control_ids = control_ids_of(recipe, tokenizer)
        self._inside = inside
        self._count = 0
        estimates = tokenizer.vocab_size > MAX_EXACT_VOCAB and bool(self._served)
        self._draws_for_kl = (
            estimates and self.settings.kl_problems > 0 and not self._sampling.is_plain
        )

    def not_measured(self) -> list[str]:
        """What an evaluation of this recipe leaves out, one line each."""
        lines: list[str] = []
        for name in self._teachers:
            if name in self._served:
                continue
            teacher = f"teacher {name} is inside the learner"
            lines.append(
                f"evaluation: {teacher} and writes nothing: its own accuracy is not measured"
            )
            if self._inside is None and self.settings.kl_problems > 0:
                lines.append(
                    f"evaluation: {teacher}, and there is none: the KL to it is not measured"
                )
        return lines

    async def evaluate(self, with_teacher: bool) -> dict[str, float]:
        """Measure the weights that the rollout servers hold now.

        Args:
            with_teacher: also measure the teacher's own accuracy (it does not change: once is enough).
        """
        self._count += 1
        student = await self._student(self._teacher)
        metrics = {
            f"{_SET}/accuracy": student.graded.mean,
            f"{_SET}/best_of_n": student.graded.best_of_n,
            f"{_SET}/truncated_frac": student.graded.truncated_frac,
            f"{_SET}/len_mean": student.graded.len_mean,
        }
        for name in self._teachers:
            metrics |= await self._to_teacher(name, student, with_teacher)
        return metrics

    async def _to_teacher(
        self, name: str, student: _Answers, with_teacher: bool
    ) -> dict[str, float]:
        """What is measured of one teacher; `student` answered under the first one's control text, if there are any."""
        several, first = len(self._teachers) > 1, name == self._teacher
        metrics: dict[str, float] = {}
        if self._control_ids and name in self._control_ids:
            student = student if first else await self._student(name)
            metrics[f"{_SET}/accuracy_as/{name}"] = student.graded.mean
        if self.settings.kl_problems > 0:
            kls = await self._kl(student.for_kl, name)
            if first:
                metrics |= {f"{_SET}/{kind}": value for kind, value in kls.items()}
            if several:
                metrics |= {f"{_SET}/{kind}_to/{name}": value for kind, value in kls.items()}
        if with_teacher and name in self._served:
            servers = self._roles.teachers[name]
            teacher = await self._accuracy(servers, f"eval-{self._count}-teacher-{name}")
            if first:
                metrics[f"{_SET}/teacher_accuracy"] = teacher.mean
            if several:
                metrics[f"{_SET}/accuracy_of/{name}"] = teacher.mean
        return metrics

    async def _student(self, teacher: str) -> _Answers:
        """The student's answers, under the control text of a teacher if it has one."""
        control = self._control_ids.get(teacher, ())
        name = f"eval-{self._count}-student" + (f"-{teacher}" if control else "")
        graded, drawn = await asyncio.gather(
            self._accuracy(self._roles.rollout, name, control), self._draw(f"{name}-kl", control)
        )
        chosen = {prompt.id for prompt in self._for_kl}
        if not self._draws_for_kl:
            drawn = [rollout for rollout in graded.rollouts if rollout.prompt_id in chosen]
        return _Answers(graded, [replace(one, num_control=len(control)) for one in drawn])

    async def _draw(self, name: str, control: tuple[int, ...]) -> list[Rollout]:
        """An answer to each problem of the KL, at temperature 1 without truncation; none where others will do."""
        if not self._draws_for_kl:
            return []
        prompts = [replace(one, token_ids=control + one.token_ids) for one in self._for_kl]
        plain = Sampling(temperature=1.0, max_new_tokens=self._sampling.max_new_tokens)
        return await sample_rollouts(self._roles.rollout, prompts, plain, name)

    async def _accuracy(
        self, servers: ServerPool, name: str, control: tuple[int, ...] = ()
    ) -> AccuracyResult:
        problems = [replace(one, token_ids=control + one.token_ids) for one in self._problems]
        shares = [problems[i :: len(servers)] for i in range(len(servers))]
        parts = await asyncio.gather(
            *(
                evaluate_accuracy(
                    servers,
                    share,
                    self._tokenizer,
                    self.grader,
                    self._sampling,
                    self.settings.samples_per_problem,
                    f"{name}-{number}",
                )
                for number, share in enumerate(shares)
                if share
            )
        )
        return summarize(
            [sample for part in parts for sample in part.samples],
            [rollout for part in parts for rollout in part.rollouts],
        )

    async def _kl(self, rollouts: Sequence[Rollout], teacher: str) -> dict[str, float]:
        if teacher not in self._served:
            return await self._kl_inside(teacher, rollouts)
        result = await evaluate_kl(
            self._roles.rollout,
            self._roles.teachers[teacher],
            rollouts,
            self._tokenizer.vocab_size,
            self._aliases.get(teacher),
        )
        metrics = {"kl_reverse": result.reverse}
        if result.forward is not None:
            metrics["kl_forward"] = result.forward
        return metrics

    async def _kl_inside(self, teacher: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """To a teacher inside the learner, which holds the weights that the rollout servers have."""
        if self._inside is None:
            return {}
        values = await self._inside.compare(teacher, rollouts)
        return {name: mean(values[name]) for name in ("kl_reverse", "kl_forward")}
