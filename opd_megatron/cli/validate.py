"""`opd validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from opd_megatron.cli.recipes import Overrides, RecipeName, describe
from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.config.rules import check
from opd_megatron.launch.offline import check_offline
from opd_megatron.launch.preflight import check_inputs, check_learner


def validate(
    name: RecipeName,
    overrides: Overrides = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Check what needs no model or prompt file; published sizes from a table.",
        ),
    ] = False,
) -> None:
    """Check a recipe, its models' layout, tokenizers and data, without starting anything.

    Not checked here: what needs the tokenizer itself (prompts that are too long or that it can not encode, which a
    run counts and rejects at its start), and this machine (`opd doctor`).
    """
    recipe, _ = resolve_recipe(name, overrides or [])
    check(recipe)
    if offline:
        unchecked = check_offline(recipe)
        for line in describe(recipe):
            typer.echo(line)
        for line in unchecked:
            typer.echo(f"not checked: {line}")
        typer.echo("valid, as far as it was checked" if unchecked else "valid")
        return
    check_learner(recipe)
    facts = check_inputs(recipe)
    for line in describe(recipe):
        typer.echo(line)
    scans = [facts.train] + ([facts.heldout] if facts.heldout else [])
    for scan in scans:
        refused = scan.rejections.by_reason
        reasons = ", ".join(f"{reason} {count}" for reason, count in refused.items())
        typer.echo(
            f"{scan.key}: {len(scan.rows)} of {scan.num_rows} rows well formed"
            + (f"; rejected: {reasons}" if reasons else "")
        )
        for example in scan.rejections.examples:
            typer.echo(f"  {example}")
    typer.echo(
        f"tokenizer: {facts.vocab_size} ids, the same for student and teachers; ends: {facts.ends}; "
        f"thinking: {facts.thinking}"
    )
    typer.echo("valid")
