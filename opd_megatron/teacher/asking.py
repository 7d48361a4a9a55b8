"""Log-probs of one served teacher at tokens that differ from position to position: a response in pieces.

A piece is the positions [a, b) of a response: the server is sent the prompt and the response up to b, scores the
positions from a on (the rest comes from its prefix cache), and gets one list for all of them, the union of what
they want. So what is answered is what was asked, exactly, and the smaller the pieces the less is answered in vain.
Pieces go to the server that scored the response: another one would compute all that stands before each of them.

Shape suffixes: L positions, J wanted tokens of a position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opd_megatron.serving.pool import ServerPool
from opd_megatron.teacher.aliases import TokenAliases
from opd_megatron.types import Rollout

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


async def ask_listed(
    servers: ServerPool,
    rollouts: Sequence[Rollout],
    wanted: Sequence[Ids],
    aliases: TokenAliases,
    piece: int,
    scored_by: Sequence[str],
    pieces_per_call: int = 128,
) -> list[Floats]:
    """Log-probs of every wanted token.

    Args:
        wanted: of each rollout, [L, J] ids as the student means them, -1 where nothing is wanted.
        piece: positions of one request.
        scored_by: of each rollout, the server that has it in its cache; empty: none.

    Returns:
        Of each rollout, [L, J] float64; NaN where nothing was wanted.

    Raises:
        ServerError, ContractError: a call failed; nothing is returned.
    """
    pieces = [
        (number, start, min(start + piece, len(ids_LJ)))
        for number, ids_LJ in enumerate(wanted)
        for start in range(0, len(ids_LJ), piece)
        if (ids_LJ[start : start + piece] >= 0).any()
    ]
    found = [np.full(ids_LJ.shape, np.nan) for ids_LJ in wanted]

    async def ask(chosen: Sequence[tuple[int, int, int]]) -> None:
        sequences, lists, columns = [], [], []
        for number, start, end in chosen:
            rollout = rollouts[number]
            response = aliases.as_teacher_reads(rollout.response_ids, not rollout.truncated)
            ids_LJ = wanted[number][start:end]
            listed = np.unique(ids_LJ[ids_LJ >= 0])
            sequences.append((rollout.taught_prompt_ids + response[:start], response[start:end]))
            columns.append(listed)
            lists.append(tuple(int(i) for i in aliases.as_student_reads(listed.astype(np.int32))))
        home = scored_by[chosen[0][0]]
        answers = await servers.score_listed(sequences, lists, stay_with=home)
        for (number, start, end), listed, answer in zip(chosen, columns, answers, strict=True):
            assert answer.listed_logprobs is not None
            ids_LJ = wanted[number][start:end]
            place_LJ = np.searchsorted(listed, np.maximum(ids_LJ, 0)).clip(max=len(listed) - 1)
            values_LJ = np.take_along_axis(answer.listed_logprobs, place_LJ, axis=1)
            found[number][start:end] = np.where(ids_LJ >= 0, values_LJ, np.nan)

    by_server: dict[str, list[tuple[int, int, int]]] = {}
    for one in pieces:
        by_server.setdefault(scored_by[one[0]], []).append(one)
    calls = [
        own[i : i + pieces_per_call]
        for own in by_server.values()
        for i in range(0, len(own), pieces_per_call)
    ]
    await asyncio.gather(*(ask(call) for call in calls))
    return found
