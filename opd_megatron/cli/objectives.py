"""`opd objectives`: what a recipe may minimise, and the words for what one does."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from opd_megatron.config.schema import Recipe
from opd_megatron.launch.teaching_checks import describe_teaching
from opd_megatron.losses.catalog import OBJECTIVES, Objective, find_objective
from opd_megatron.losses.settings import LISTED_SUPPORTS, SERVED_SUPPORTS, LossSettings

_NORMALIZATIONS = ("token_mean", "sequence_mean")


def as_record(row: Objective) -> dict[str, Any]:
    """One objective as `opd objectives --json` prints it."""
    return {
        "name": row.name,
        "divergence": row.divergence,
        "estimator": row.estimator,
        "measure": row.measure or None,
        "token_weights": row.token_weights or None,
        "support": list(row.supports) or ["given" if row.is_supervised else "sampled"],
        "normalization": list(_NORMALIZATIONS),
        "target": row.target,
        "descends": row.descends,
        "status": "proven" if row.proven else "biased",
        "why_biased": row.why_biased or None,
        "source": row.source,
    }


def objectives(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List every objective: target, estimator, support, proven or declared biased, source."""
    if as_json:
        typer.echo(json.dumps([as_record(row) for row in OBJECTIVES], indent=2))
        return
    width = max(len(row.name) for row in OBJECTIVES)
    typer.echo("student pi, teacher q; reverse_kl = KL(pi || q), forward_kl = KL(q || pi)")
    typer.echo(f"normalization of each: {', '.join(_NORMALIZATIONS)}, over the global batch\n")
    for title, chosen in (
        (
            "from the sampled token",
            [row for row in OBJECTIVES if not row.measure and not row.is_supervised],
        ),
        (
            "over a support, differentiated through the student",
            [r for r in OBJECTIVES if r.measure],
        ),
        ("from given responses (supervised)", [r for r in OBJECTIVES if r.is_supervised]),
    ):
        typer.echo(f"{title}:")
        for row in chosen:
            typer.echo(f"  {row.name:<{width}}  {_verdict(row)}  [{row.source}]")
        typer.echo("")
    supports = next(row.supports for row in OBJECTIVES if row.supports)
    typer.echo(f"supports: {', '.join(supports)}")
    typer.echo(f"served teachers (teachers.NAME.engine=sglang) score {', '.join(SERVED_SUPPORTS)};")
    typer.echo(f"and {', '.join(LISTED_SUPPORTS)} by objective.support_route;")
    typer.echo(
        "teachers inside the learner (in_process) all of them, exactly, and full without a K"
    )
    typer.echo("biased objectives need objective.allow_biased=true; formulas: docs/losses.md")


def _verdict(row: Objective) -> str:
    if row.proven:
        return f"proven  {row.target}"
    return f"biased  descends {row.descends}: {row.why_biased}"


def describe_loss(recipe: Recipe) -> list[str]:
    """What a recipe minimises and who teaches it, one line per part that is in use."""
    settings = LossSettings.of(recipe)
    objective, correction = recipe.objective, recipe.correction
    row = find_objective(objective)
    status = "proven" if row.proven else f"biased, descends {row.descends}"
    lines = [f"objective {row.name}: {row.target} ({status}), {objective.normalization}"]
    if settings.has_support:
        everything = "every token: no K, and every measure is the divergence itself"
        size = everything if settings.has_full_support else f"K = {objective.topk}"
        lines.append(f"support {objective.support}, {size}")
    parts = []
    if objective.coefficient != 1.0:
        parts.append(f"coefficient {objective.coefficient:g}")
    if objective.discount:
        parts.append(f"discount {objective.discount:g}")
    if objective.entropy_bonus:
        parts.append(f"entropy bonus {objective.entropy_bonus:g}")
    if settings.is_supervised:
        parts.append("responses of the data, end token included")
    elif correction.kind == "none":
        parts.append("no importance weights")
    else:
        parts.append(
            f"{correction.kind} importance weights per {correction.level} in "
            f"[{correction.low:g}, {correction.high:g}]"
        )
    if settings.truncated:
        rollout = recipe.rollout
        parts.append(
            f"rollouts truncated by top_p {rollout.top_p:g}, top_k {rollout.top_k}, min_p {rollout.min_p:g}: "
            "a sampled-token estimator descends its divergence on the kept tokens (losses/truncation.py)"
        )
    if recipe.filter.score != "none":
        parts.append(
            f"tokens of {recipe.filter.score} {recipe.filter.low:g}-{recipe.filter.high:g} %"
        )
    if recipe.task.coefficient:
        parts.append(f"task {recipe.task.grader} x {recipe.task.coefficient:g}")
    if recipe.whitening.scope != "none":
        parts.append(f"{recipe.whitening.of} whitened by {recipe.whitening.scope}")
    if objective.mask_special_tokens != "none":
        parts.append(f"special tokens masked: {objective.mask_special_tokens}")
    if settings.updates_per_step > 1:
        parts.append(
            f"{settings.updates_per_step} updates a step, clipped to "
            f"[{1 - objective.clip_low:g}, {1 + objective.clip_high:g}]"
        )
    return [*lines, "with " + ", ".join(parts), *describe_teaching(recipe)]
