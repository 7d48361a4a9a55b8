"""The `opd` command. Nothing here imports torch; what needs it runs in the processes that are started."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from opd_megatron.cli import artifacts, estimate, jobs, objectives, recipes, runs, submit, validate
from opd_megatron.errors import EXIT_CONFIG, OpdError, StorageError

_USAGE_ERROR = 2

app = typer.Typer(
    name="opd",
    help="On-policy distillation of language models at Megatron scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(runs.run)
app.command("estimate")(estimate.estimate)
app.command("validate")(validate.validate)
app.add_typer(recipes.app, name="recipes")
app.command("objectives")(objectives.objectives)
app.command("probe")(runs.probe)
app.command("eval")(runs.evaluate)
app.command("submit")(submit.submit)
app.command("status")(jobs.status)
app.command("logs")(jobs.logs)
app.command("cancel")(jobs.cancel)
app.command("resume")(jobs.resume_run)
app.command("report")(artifacts.report)
app.command("export")(artifacts.export)
app.command("doctor")(artifacts.doctor)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from opd_megatron import __version__

        typer.echo(f"opd_megatron {__version__}")
        raise typer.Exit


def main(argv: list[str] | None = None) -> None:
    """Entry point. Errors a user can meet are one message on stderr and the exit code of their kind."""
    try:
        app(args=argv)
    except OpdError as error:
        print(f"opd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        storage = StorageError.of(error)
        if storage is None:
            raise
        print(f"opd: {storage}", file=sys.stderr)
        sys.exit(storage.exit_code)
    except SystemExit as stop:
        # Typer ends a usage error with 2; here every mistake a user can fix is one code.
        sys.exit(EXIT_CONFIG if stop.code == _USAGE_ERROR else stop.code)
