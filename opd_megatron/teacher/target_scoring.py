"""Rollouts to the scores of one target by served teachers: only its members are asked, all at once.

    one teacher, its own tokens          one request (scoring.py)
    the student's tokens, or a mean      each member's list, what is missing by the route, then joint.py

Shape suffixes: L positions, K entries of a list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from opd_megatron.losses.settings import LISTED_SUPPORTS
from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.teacher.asking import Floats, Ids, ask_listed
from opd_megatron.teacher.joint import Listing, candidates, join, missing
from opd_megatron.teacher.routes import Route
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.teacher.target import Target
from opd_megatron.types import Rollout, TeacherScores


@dataclass(frozen=True)
class Wanted:
    """What a loss needs of served teachers.

    support: of the recipe; "" where it looks at sampled tokens only. topk: K of either side, 0 without a list.
    route: None where sampled tokens are all. temperatures: of teachers that score their own tokens, alone
    (`launch/contracts.py` refuses the rest).
    """

    support: str = ""
    topk: int = 0
    route: Route | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def student_topk(self) -> int:
        """K that rollouts must bring along."""
        return self.topk if self.support in LISTED_SUPPORTS else 0

    @property
    def width(self) -> int:
        """Entries of a list."""
        return 2 * self.topk if self.support in ("union", "symmetric_difference") else self.topk


async def score_target(
    teachers: Mapping[str, ServerPool],
    target: Target,
    rollouts: Sequence[Rollout],
    wanted: Wanted,
    aliases: Mapping[str, TokenAliases],
) -> list[TeacherScores]:
    """Scores of every rollout under the target, in order.

    Raises:
        ConfigError: a member has no server.
        ServerError, ContractError: a call failed; no score is returned.
    """
    if not target.mean and not wanted.student_topk:
        routes = [target.name] * len(rollouts)
        return await score_rollouts(
            teachers,
            rollouts,
            routes,
            topk=wanted.topk,
            aliases=aliases,
            temperatures=wanted.temperatures,
        )
    route = wanted.route
    topk = 0 if route is None else route.topk
    scored = await asyncio.gather(
        *(
            score_rollouts(teachers, rollouts, [name] * len(rollouts), topk=topk, aliases=aliases)
            for name in target.members
        )
    )
    listings = [[_listing(member[i]) for member in scored] for i in range(len(rollouts))]
    students = [_student_ids(rollout, wanted) for rollout in rollouts]
    ids = [candidates(own, student) for own, student in zip(listings, students, strict=True)]
    asked: list[list[Floats] | None] = [None] * len(target.members)
    if route is not None and route.kind == "listed":
        asked = list(
            await asyncio.gather(
                *(
                    ask_listed(
                        teachers[name],
                        rollouts,
                        [missing(ids[i], listings[i][m]) for i in range(len(rollouts))],
                        aliases.get(name, TokenAliases()),
                        route.piece,
                        [scores.server for scores in scored[m]],
                    )
                    for m, name in enumerate(target.members)
                )
            )
        )

    def join_all() -> list[TeacherScores]:
        return [
            _joined(
                target,
                listings[i],
                ids[i],
                [None if more is None else more[i] for more in asked],
                wanted,
                students[i],
            )
            for i in range(len(rollouts))
        ]

    return await asyncio.to_thread(join_all)


def _listing(scores: TeacherScores) -> Listing:
    length = len(scores.sampled_logprobs)
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    return Listing(
        scores.sampled_logprobs.astype(np.float64),
        np.zeros((length, 0), np.int64) if ids is None else ids.astype(np.int64),
        np.zeros((length, 0)) if logprobs is None else logprobs.astype(np.float64),
    )


def _student_ids(rollout: Rollout, wanted: Wanted) -> Ids | None:
    if not wanted.student_topk:
        return None
    if not rollout.response_ids:
        return np.zeros((0, wanted.student_topk), np.int64)
    assert rollout.topk_ids is not None, "the rollout was asked for the student's top-K"
    return rollout.topk_ids.astype(np.int64)


def _joined(
    target: Target,
    listings: Sequence[Listing],
    ids_LJ: Ids,
    asked: Sequence[Floats | None],
    wanted: Wanted,
    student_ids_LK: Ids | None,
) -> TeacherScores:
    support = wanted.support if wanted.student_topk else "teacher_topk"
    joint = join(
        target,
        listings,
        ids_LJ,
        asked,
        support=support,
        topk=max(wanted.topk, 1),
        student_ids_LK=student_ids_LK,
    )
    left_out, error = (x.astype(np.float32) for x in (joint.left_out_L, joint.error_L))
    sampled = joint.sampled_L.astype(np.float32)
    if not wanted.topk:
        return TeacherScores(target.name, sampled, error_nats=error)
    return TeacherScores(
        target.name,
        sampled,
        joint.ids_LJ.astype(np.int32),
        joint.logprobs_LJ.astype(np.float32),
        left_out,
        error,
    )
