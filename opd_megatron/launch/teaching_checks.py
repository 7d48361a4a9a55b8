"""Who will teach, and how servers are asked: checked against the data, and told before anything starts. No torch."""

from __future__ import annotations

from pathlib import Path

from opd_megatron.config.schema import DRAWS, MEANS, SWITCHES, Recipe
from opd_megatron.data.rows import RowScan
from opd_megatron.data.tokenizer_files import tokenizer_fingerprint
from opd_megatron.errors import ConfigError, did_you_mean
from opd_megatron.teacher.choice import member_starts, member_weights
from opd_megatron.teacher.routes import route_of
from opd_megatron.teacher.target import Target


def check_teaching(recipe: Recipe, train: RowScan, vocab_size: int) -> None:
    """
    Raises:
        ConfigError: a domain that no row has, domains that are to alternate where there are none, or a route that does
            not fit its budget.
    """
    route_of(recipe, vocab_size)
    seen = {row.domain: None for row in train.rows if row.domain is not None}
    for domain in recipe.teaching.domains:
        if domain not in seen:
            raise ConfigError.of(
                f"teaching.domains.{domain}",
                recipe.teaching.domains[domain],
                f"no row of {train.path.name} has this domain{did_you_mean(domain, seen)}",
                f"use one of: {', '.join(seen) or 'none, the rows have no domain'}",
            )
    if recipe.data.alternate_domains and len(seen) < 2:
        raise ConfigError.of(
            "data.alternate_domains",
            True,
            f"the rows of {train.path.name} have {len(seen)} domains",
            "set it to false, or give rows a domain",
        )


def describe_teaching(recipe: Recipe) -> list[str]:
    """The schedule in words, and the route of every request to a served teacher."""
    lines: list[str] = []
    config = recipe.teaching
    if config.kind in MEANS:
        lines.append(f"teaching {Target.of(config.kind, member_weights(recipe)).name}")
    if config.kind in DRAWS:
        shares = Target.of("arithmetic_mean", member_weights(recipe)).weights
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        lines.append(f"teaching {config.kind}: each prompt by one of {shown}")
    if config.kind in SWITCHES:
        over = config.over_steps or recipe.steps
        shown = ", ".join(
            f"{name} from step {start * over:g}" for name, start in member_starts(recipe)
        )
        lines.append(f"teaching {config.kind} over {over} steps: {shown}")
    for domain, teacher in config.domains.items():
        lines.append(f"teaching domain {domain}: {teacher}")
    if not recipe.is_supervised and recipe.served_teachers and Path(recipe.student.path).is_dir():
        vocab_size = tokenizer_fingerprint(Path(recipe.student.path)).vocab_size
        route = route_of(recipe, vocab_size)
        if route is not None:
            lines.append(f"served teachers are asked for {route.describe()}")
    return lines
