"""`opd report`, `opd export`, `opd doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from opd_megatron.config.run_yaml import read_run_mapping
from opd_megatron.errors import EXIT_CONFIG, EXIT_INTERRUPTED
from opd_megatron.rundir import RunDir

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def report(run: RunArgument) -> None:
    """Write RUN/report.html again and print its path."""
    directory = RunDir(run.resolve())
    read_run_mapping(directory.run_yaml)
    from opd_megatron.observe.report import render_report

    typer.echo(render_report(directory.root))


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", help="New directory for the model.")],
    step: Annotated[
        int | None, typer.Option("--step", help="Commit to export. Default: the newest.")
    ] = None,
) -> None:
    """Write the student of a commit as a Hugging Face directory (safetensors, tokenizer, chat template)."""
    from opd_megatron.launch.export import export_commit
    from opd_megatron.launch.supervisor import Interrupted

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        export_commit(RunDir(run.resolve()), out.resolve(), step, say)
    except Interrupted as interruption:
        say(f"{interruption}: nothing was written")
        sys.exit(EXIT_INTERRUPTED)


def doctor() -> None:
    """Check this machine: versions, packages that must not be there, ports, memory, disk."""
    from opd_megatron.launch.doctor import run_checks

    results = run_checks()
    for result in results:
        mark = "ok  " if result.ok else "FAIL"
        typer.echo(f"{mark}  {result.name:<22} {result.detail}")
        if not result.ok and result.fix:
            typer.echo(f"      fix: {result.fix}")
    if not all(result.ok for result in results):
        sys.exit(EXIT_CONFIG)
