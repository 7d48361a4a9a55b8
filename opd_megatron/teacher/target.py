"""What a sample learns from: one teacher, or a mean of several with their weights.

A target has a name, and the name says everything: it is what stands in a step batch and in the records.

    good                                   one teacher
    arithmetic_mean(good=0.25,weak=0.75)   sum w q
    geometric_mean(good=0.5,weak=0.5)      prod q^w / Z
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from opd_megatron.config.schema import MEANS
from opd_megatron.errors import ContractError

_MEAN = re.compile(rf"({'|'.join(MEANS)})\(([^()]*)\)")


@dataclass(frozen=True)
class Target:
    """`weights` are above 0 and sum to 1, in the order of their names; `mean` is empty for one teacher.

    Example: `Target.of("arithmetic_mean", {"weak": 3, "good": 1}).name` is `arithmetic_mean(good=0.25,weak=0.75)`.
    """

    mean: str
    weights: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, mean: str, weights: Mapping[str, float]) -> Target:
        """Normalised; members of weight 0 are left out, and one member alone is itself under any mean."""
        total = sum(weights.values())
        kept = tuple(sorted((name, w / total) for name, w in weights.items() if w > 0.0))
        return cls("", ((kept[0][0], 1.0),)) if len(kept) == 1 else cls(mean, kept)

    @classmethod
    def one(cls, teacher: str) -> Target:
        return cls("", ((teacher, 1.0),))

    @classmethod
    def parse(cls, name: str) -> Target:
        """The target of a name.

        Raises:
            ContractError: no target has this name.
        """
        if "(" not in name:
            return cls.one(name)
        found = _MEAN.fullmatch(name)
        pairs = [part.partition("=") for part in found[2].split(",")] if found else []
        try:
            weights = tuple((member, float(weight)) for member, _, weight in pairs)
        except ValueError:
            weights = ()
        target = cls(found[1] if found else "", weights)
        if len(weights) < 2 or target.name != name:
            raise ContractError(f"target {name!r}: not the name of a teacher or of a mean of some")
        return target

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.weights)

    @property
    def name(self) -> str:
        if not self.mean:
            return self.weights[0][0]
        return f"{self.mean}({','.join(f'{name}={weight!r}' for name, weight in self.weights)})"


def is_inside(name: str, in_process: Collection[str]) -> bool:
    """Whether every member of the target of that name is among `in_process`.

    Raises:
        ContractError: no target has this name, or only some members are.
    """
    members = Target.parse(name).members
    inside = [member in in_process for member in members]
    if any(inside) and not all(inside):
        raise ContractError(
            f"target {name!r}: some members are inside the learner and some are not"
        )
    return all(inside)
