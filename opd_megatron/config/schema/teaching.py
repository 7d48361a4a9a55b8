"""The section that says which teacher a token learns from, when there are several."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_megatron.config.schema.fields import choice, number

MEANS = ("arithmetic_mean", "geometric_mean")
SWITCHES = ("hard_switch", "soft_switch")
# A prompt gets one member, drawn by weight.
DRAWS = ("random", "control_token")
MAX_MEMBERS = 8


@dataclass(frozen=True, kw_only=True)
class TeachingConfig:
    """What several teachers become. A row that names its `teacher`, or a `domain` of `domains`, keeps that one.

    rows              the first teacher, for rows that name none
    arithmetic_mean   sum w q
    geometric_mean    prod q^w / Z
    hard_switch       the member whose turn it is
    soft_switch       `mean` of two members, from all of one at its start to all of the next at the next one's start
    random            one member for each prompt
    control_token     as `random`; the student's prompt begins with the member's control text, which no teacher sees

    Progress runs from 0 at the first step to 1 after step `over_steps` (0: the run's `steps`).
    """

    kind: str = choice("rows", "rows", *MEANS, *SWITCHES, *DRAWS)
    # Members of the means and draws, with weights of any sum; empty: every teacher, all alike.
    weights: dict[str, float] = field(default_factory=dict[str, float])
    # Members of the switches, with the progress at which each begins; empty: every teacher, in equal parts.
    starts: dict[str, float] = field(default_factory=dict[str, float])
    mean: str = choice("arithmetic_mean", *MEANS)
    # Text before the prompt, by member; read by the student's tokenizer.
    control_texts: dict[str, str] = field(default_factory=dict[str, str])
    domains: dict[str, str] = field(default_factory=dict[str, str])
    over_steps: int = number(0, 0)
