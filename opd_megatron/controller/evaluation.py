"""When evaluation is due: held-out accuracy on the rollout servers, the KL to the teacher, the teacher's accuracy.

A teacher inside the learner is compared there, exactly; its accuracy is not measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from opd_megatron.config.schema import Recipe
from opd_megatron.controller.in_process import LearnerTeachers, mean
from opd_megatron.controller.roles import Roles
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.eval.evaluate import AccuracyResult, evaluate_accuracy, evaluate_kl, summarize
from opd_megatron.eval.grading import Grader, check_answers, make_grader
from opd_megatron.serving.client import Sampling
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.types import Prompt, Rollout

_SET = "eval/heldout"


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
        check_answers(self._problems)
        self._sampling = Sampling(
            temperature=self.settings.temperature, max_new_tokens=recipe.rollout.max_new_tokens
        )
        # Supervised training may do without one: there is accuracy then, and no KL.
        self._teacher = next(iter(recipe.teachers), None)
        self._aliases = aliases.get(self._teacher or "", TokenAliases())
        self._is_served = self._teacher in recipe.served_teachers
        self._inside = inside
        self._count = 0

    def not_measured(self) -> list[str]:
        """What an evaluation of this recipe leaves out, one line each."""
        if self._teacher is None or self._is_served:
            return []
        teacher = f"teacher {self._teacher} is inside the learner"
        lines = [f"evaluation: {teacher} and writes nothing: its own accuracy is not measured"]
        if self._inside is None and self.settings.kl_problems > 0:
            lines.append(f"evaluation: {teacher}, and there is none: the KL to it is not measured")
        return lines

    async def evaluate(self, with_teacher: bool) -> dict[str, float]:
        """Measure the weights that the rollout servers hold now.

        Args:
            with_teacher: also measure the teacher's own accuracy (it does not change: once is enough).
        """
        self._count += 1
        student = await self._accuracy(self._roles.rollout, f"eval-{self._count}-student")
        metrics = {
            f"{_SET}/accuracy": student.mean,
            f"{_SET}/best_of_n": student.best_of_n,
            f"{_SET}/truncated_frac": student.truncated_frac,
            f"{_SET}/len_mean": student.len_mean,
        }
        if self._teacher is None:
            return metrics
        if self.settings.kl_problems > 0:
            metrics |= await self._kl(student, self._teacher)
        if with_teacher and self._is_served:
            servers = self._roles.teachers[self._teacher]
            teacher = await self._accuracy(servers, f"eval-{self._count}-teacher")
            metrics[f"{_SET}/teacher_accuracy"] = teacher.mean
        return metrics

    async def _accuracy(self, servers: ServerPool, name: str) -> AccuracyResult:
        shares = [self._problems[i :: len(servers)] for i in range(len(servers))]
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

    async def _kl(self, student: AccuracyResult, teacher: str) -> dict[str, float]:
        chosen = {prompt.id for prompt in self._problems[: self.settings.kl_problems]}
        rollouts = [rollout for rollout in student.rollouts if rollout.prompt_id in chosen]
        if not self._is_served:
            return await self._kl_inside(teacher, rollouts)
        result = await evaluate_kl(
            self._roles.rollout,
            self._roles.teachers[teacher],
            rollouts,
            self._tokenizer.vocab_size,
            self._aliases,
        )
        metrics = {f"{_SET}/kl_reverse": result.reverse}
        if result.forward is not None:
            metrics[f"{_SET}/kl_forward"] = result.forward
        return metrics

    async def _kl_inside(self, teacher: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """To a teacher inside the learner, which holds the weights that the rollout servers have."""
        if self._inside is None:
            return {}
        values = await self._inside.compare(teacher, rollouts)
        return {f"{_SET}/{name}": mean(values[name]) for name in ("kl_reverse", "kl_forward")}
