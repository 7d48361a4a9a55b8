"""Every teacher on the same few rollouts of the student: which one could it learn from?

1. The rollout servers answer training prompts, sampled as in training, and list their own likeliest tokens there; with
   control texts once under each, for that one's teacher.
2. Each served teacher lists its own at the same positions (`eval/teacher_match.py`); one inside the learner is
   compared there, exactly, and has no list.
3. With held-out answers, student and served teachers solve the first held-out problems, sampled as in an evaluation.

Nothing is trained and no weight moves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from opd_megatron.config.schema import Recipe
from opd_megatron.controller.evaluation import evaluation_sampling
from opd_megatron.controller.generation import generate_group, sampling_of
from opd_megatron.controller.in_process import LearnerTeachers, mean
from opd_megatron.controller.roles import Roles
from opd_megatron.controller.teaching import control_ids_of
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.eval.evaluate import MAX_EXACT_VOCAB, evaluate_accuracy
from opd_megatron.eval.grading import make_grader
from opd_megatron.eval.teacher_match import Listed, match_teacher
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.types import Prompt, Rollout, TeacherScores

# What is listed of a vocabulary that is too large to be listed whole.
_MIN_LISTED = 64
_SELF = "student"


@dataclass(frozen=True)
class ProbeRow:
    """One teacher, or the student itself. None: not measured. KLs in nats per token; `seconds`: to score all."""

    name: str
    engine: str
    accuracy: float | None = None
    reverse_kl: float | None = None
    reverse_kl_error: float | None = None
    forward_kl: float | None = None
    exact: bool = True
    overlap: float | None = None
    student_mass: float | None = None
    teacher_mass: float | None = None
    end_agreement: float | None = None
    num_tokens: int = 0
    seconds: float | None = None

    def to_record(self) -> dict[str, object]:
        return asdict(self)


def ranked(rows: Sequence[ProbeRow]) -> list[ProbeRow]:
    """The most accurate first, and of equals the nearest in reverse KL; what was not measured comes last."""
    return sorted(
        rows,
        key=lambda row: (
            row.accuracy is None,
            -(row.accuracy or 0.0),
            row.reverse_kl is None,
            row.reverse_kl or 0.0,
        ),
    )


class Probe:
    """Runs the three parts of the module docstring.

    Args:
        train: prompts of the training data; the first `preflight.probe_prompts` are used.
        heldout: problems with answers, or none.
        inside: the teachers inside the learner; None without a learner.
    """

    def __init__(
        self,
        recipe: Recipe,
        roles: Roles,
        tokenizer: ChatTokenizer,
        aliases: Mapping[str, TokenAliases],
        train: Sequence[Prompt],
        heldout: Sequence[Prompt],
        inside: LearnerTeachers | None,
    ) -> None:
        self._recipe = recipe
        self._roles = roles
        self._tokenizer = tokenizer
        self._aliases = aliases
        self._train = tuple(train[: recipe.preflight.probe_prompts])
        self._heldout = tuple(heldout[: recipe.preflight.probe_prompts])
        self._inside = inside
        self._control_ids = control_ids_of(recipe, tokenizer)
        vocab = tokenizer.vocab_size
        self._num_top = min(recipe.preflight.probe_topk, vocab)
        exact = vocab <= MAX_EXACT_VOCAB
        self._listed = vocab if exact else min(vocab, max(_MIN_LISTED, self._num_top))

    async def run(self) -> tuple[ProbeRow, list[ProbeRow]]:
        """The student's row, and those of the teachers, ranked.

        Raises:
            ServerError, ContractError: from a server.
        """
        first = self._recipe.evaluation.teacher or next(iter(self._recipe.teachers), "")
        control = self._control_ids.get(first, ())
        asked = {control: await self._ask(control)}
        accuracy = await self._accuracy(_SELF, self._roles.rollout, control)
        tokens = sum(len(rollout.response_ids) for rollout in asked[control][0])
        rows: list[ProbeRow] = []
        for name in self._recipe.teachers:
            control = self._control_ids.get(name, ())
            if control not in asked:
                asked[control] = await self._ask(control)
            rollouts, student = asked[control]
            if name in self._recipe.served_teachers:
                rows.append(await self._served(name, rollouts, student))
            else:
                rows.append(await self._inside_learner(name, rollouts))
        return ProbeRow(_SELF, "sglang", accuracy, num_tokens=tokens), ranked(rows)

    async def _ask(self, control: tuple[int, ...]) -> tuple[list[Rollout], list[TeacherScores]]:
        """The student's rollouts under a control text, and what it says of them itself, under the same text."""
        rollouts = await self._rollouts(control)
        as_read = [replace(rollout, num_control=0) for rollout in rollouts]
        return rollouts, await self._score(_SELF, self._roles.rollout, as_read)

    async def _rollouts(self, control: tuple[int, ...]) -> list[Rollout]:
        sampling = sampling_of(self._recipe.rollout)
        count = self._recipe.preflight.probe_rollouts
        groups = await asyncio.gather(
            *(
                generate_group(
                    self._roles.rollout,
                    replace(prompt, token_ids=control + prompt.token_ids),
                    sampling,
                    [f"probe-{number}#{k}" for k in range(count)],
                    0,
                    num_control=len(control),
                )
                for number, prompt in enumerate(self._train)
            )
        )
        return [rollout for group in groups for rollout in group]

    async def _score(
        self, name: str, servers: ServerPool, rollouts: Sequence[Rollout]
    ) -> list[TeacherScores]:
        return await score_rollouts(
            {name: servers},
            rollouts,
            [name] * len(rollouts),
            topk=self._listed,
            aliases=self._aliases,
        )

    async def _served(
        self, name: str, rollouts: Sequence[Rollout], student: Sequence[TeacherScores]
    ) -> ProbeRow:
        begin = time.monotonic()
        scores = await self._score(name, self._roles.teachers[name], rollouts)
        seconds = time.monotonic() - begin
        # In a thread: long responses take a while, and the heartbeat goes on.
        match = await asyncio.to_thread(
            match_teacher,
            [
                (_listed(ours), _listed(theirs))
                for ours, theirs in zip(student, scores, strict=True)
            ],
            [rollout.response_ids for rollout in rollouts],
            vocab_size=self._tokenizer.vocab_size,
            num_top=self._num_top,
            end_ids=self._tokenizer.eos_ids,
        )
        return ProbeRow(
            name,
            "sglang",
            accuracy=await self._accuracy(name, self._roles.teachers[name]),
            reverse_kl=match.reverse,
            reverse_kl_error=match.reverse_error,
            forward_kl=match.forward,
            exact=match.exact,
            overlap=match.overlap,
            student_mass=match.student_mass,
            teacher_mass=match.teacher_mass,
            end_agreement=match.end_agreement,
            num_tokens=match.num_tokens,
            seconds=seconds,
        )

    async def _inside_learner(self, name: str, rollouts: Sequence[Rollout]) -> ProbeRow:
        """Exact KLs from the learner; a teacher there writes nothing, so its accuracy is not measured."""
        assert self._inside is not None, "the learner was started for it"
        begin = time.monotonic()
        values = await self._inside.compare(name, rollouts)
        reverse = values["kl_reverse"]
        return ProbeRow(
            name,
            "in_process",
            reverse_kl=mean(reverse),
            reverse_kl_error=float(reverse.std() / max(1, len(reverse)) ** 0.5),
            forward_kl=mean(values["kl_forward"]),
            num_tokens=len(reverse),
            seconds=time.monotonic() - begin,
        )

    async def _accuracy(
        self, name: str, servers: ServerPool, control: tuple[int, ...] = ()
    ) -> float | None:
        if not self._heldout:
            return None
        result = await evaluate_accuracy(
            servers,
            [replace(one, token_ids=control + one.token_ids) for one in self._heldout],
            self._tokenizer,
            make_grader(self._recipe.evaluation.grader),
            evaluation_sampling(self._recipe),
            self._recipe.evaluation.samples_per_problem,
            f"probe-accuracy-{name}",
        )
        return result.mean


def _listed(scores: TeacherScores) -> Listed:
    assert scores.topk_ids is not None and scores.topk_logprobs is not None, "K > 0 was asked for"
    return Listed(scores.sampled_logprobs, scores.topk_ids, scores.topk_logprobs)
