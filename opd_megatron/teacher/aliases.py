"""Tokens that mean the same under different ids: mostly the end tokens of a Base student and an Instruct teacher.

A student that ends with `<|endoftext|>` looks endless to a teacher that ends with `<|im_end|>`: the teacher gives its
end token almost no probability, and the student unlearns to stop. An alias lets the two ids swap places in the
teacher's distribution, at every position: what the teacher says of its own end token counts for the student's, and the
other way round, so a distribution stays one.

A teacher scores the ids it is sent. The last id of a response that ended is nobody's context, so it is sent as the
teacher's own. An aliased id elsewhere in a response must stay what it is for the tokens after it; its own score
would be of another token, so it does not train (`unscorable`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd_megatron.config.schema import Recipe
from opd_megatron.data.tokenizer_files import tokenizer_fingerprint
from opd_megatron.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class TokenAliases:
    """`swaps` maps an id to its partner, both ways; empty without aliases.

    Example: {0: 7, 7: 0}: a response (4, 5, 0) that ended is scored as (4, 5, 7).
    """

    swaps: Mapping[int, int] = field(default_factory=dict[int, int])

    def as_teacher_reads(self, response_ids: tuple[int, ...], ended: bool) -> tuple[int, ...]:
        """The ids to send: the last one is the teacher's, if the student ended the response."""
        if not ended or not response_ids or response_ids[-1] not in self.swaps:
            return response_ids
        return (*response_ids[:-1], self.swaps[response_ids[-1]])

    def unscorable(self, response_ids: Sequence[int], ended: bool) -> NDArray[np.bool_]:
        """[L] True where the teacher's score is of another token than the student's."""
        found = np.asarray([token in self.swaps for token in response_ids], dtype=np.bool_)
        if ended and len(found):
            found[-1] = False
        return found

    def as_student_reads(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids of a teacher's top-K, of any shape, as the student means them."""
        translated = ids.copy()
        for one, other in self.swaps.items():
            translated[ids == one] = other
        return translated


def resolve_aliases(
    aliases: Mapping[str, str], student_directory: Path, teacher_name: str
) -> TokenAliases:
    """Look the tokens of a recipe's `teachers.NAME.aliases` up in the student's tokenizer.

    Student and teacher share one vocabulary, so one tokenizer knows both ids.

    Raises:
        ConfigError: no such token, or a token in two pairs.
    """
    if not aliases:
        return TokenAliases()
    ids = {text: i for i, text in tokenizer_fingerprint(student_directory).tokens.items()}
    key = f"teachers.{teacher_name}.aliases"
    swaps: dict[int, int] = {}
    for pair in aliases.items():
        for text in pair:
            if text not in ids:
                raise ConfigError(
                    f"{key}={dict(aliases)!r}: the tokenizer has no token {text!r}"
                    f"{did_you_mean(text, ids)}; write both as the tokenizer spells them"
                )
        one, other = ids[pair[0]], ids[pair[1]]
        if one == other or one in swaps or other in swaps:
            raise ConfigError.of(
                key,
                dict(aliases),
                f"{pair[0]!r} and {pair[1]!r} must be two tokens, each in one pair only",
                "remove the repetition",
            )
        swaps |= {one: other, other: one}
    return TokenAliases(swaps)


def aliases_of(recipe: Recipe) -> dict[str, TokenAliases]:
    """The aliases of every teacher of a recipe, by name.

    Raises:
        ConfigError: as `resolve_aliases`.
    """
    student = Path(recipe.student.path)
    return {
        name: resolve_aliases(teacher.aliases, student, name)
        for name, teacher in recipe.teachers.items()
    }
