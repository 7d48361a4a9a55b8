"""`opd probe` as a process: asks the servers, writes probe.json, prints a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from opd_megatron.atomic import write_json
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.entry import run_attempt
from opd_megatron.controller.generation import sampling_of
from opd_megatron.controller.in_process import LearnerTeachers
from opd_megatron.controller.probe import Probe, ProbeRow
from opd_megatron.controller.roles import Roles, open_roles, wait_for_learner, wait_for_servers
from opd_megatron.controller.teaching import data_config
from opd_megatron.data.chat import load_chat_tokenizer
from opd_megatron.data.prompts import load_prompts
from opd_megatron.observe.console import RunConsole
from opd_megatron.observe.formats import human_duration, human_value
from opd_megatron.rundir import RunDir
from opd_megatron.teacher.aliases import aliases_of

# A table in a log must not depend on who reads it.
_WIDTH = 120
_NOT_MEASURED = "-"
# Below it the student will unlearn to stop, or never learn it.
_LOW_END_AGREEMENT = 0.1


async def run_probe(recipe: Recipe, run: RunDir, attempt: int) -> None:
    console = RunConsole(recipe.steps)
    tokenizer = load_chat_tokenizer(Path(recipe.student.path), thinking=recipe.data.thinking)
    teachers = tuple(recipe.teachers)
    data = data_config(recipe, tokenizer)
    train = load_prompts(Path(recipe.data.train), data, teachers, tokenizer)
    heldout = None
    if recipe.data.heldout:
        path = Path(recipe.data.heldout)
        heldout = load_prompts(path, data, teachers, tokenizer, "data.heldout")
    files = run.attempt(attempt)
    async with AsyncExitStack() as stack:
        roles = open_roles(recipe, files, tokenizer.vocab_size, stack, console.say)
        await wait_for_servers(recipe, roles, console)
        inside = None
        if recipe.in_process_teachers:
            inside = await _load_learner(recipe, roles, files.batches, console)
        prompts = () if heldout is None else heldout.prompts
        probe = Probe(recipe, roles, tokenizer, aliases_of(recipe), train.prompts, prompts, inside)
        student, rows = await probe.run()
        files.finishing.touch()
        if inside is not None:
            roles.learner.tell_to_stop()
    record = {
        "student": {"path": recipe.student.path, **student.to_record()},
        "teachers": [{"path": recipe.teachers[r.name].path, **r.to_record()} for r in rows],
        "probe_prompts": min(recipe.preflight.probe_prompts, len(train)),
        "probe_rollouts": recipe.preflight.probe_rollouts,
        "probe_topk": recipe.preflight.probe_topk,
        "rollout_temperature": recipe.rollout.temperature,
    }
    write_json(run.root / "probe.json", record)
    Console(width=_WIDTH, soft_wrap=False).print(table_of(student, rows))
    for line in notes_of(rows, is_plain=sampling_of(recipe.rollout).is_plain):
        console.say(line)
    console.say(f"wrote {run.root / 'probe.json'}")


async def _load_learner(
    recipe: Recipe, roles: Roles, folder: Path, console: RunConsole
) -> LearnerTeachers:
    await wait_for_learner(recipe, roles, console)
    await roles.learner.ask("load", source="hf", path=recipe.student.path)
    return LearnerTeachers(roles.learner, folder)


def table_of(student: ProbeRow, rows: Sequence[ProbeRow]) -> Table:
    """Teachers by rank, the student below them."""
    table = Table(title=f"{student.num_tokens} response tokens of the student", show_lines=False)
    table.add_column("rank")
    table.add_column("teacher")
    for heading in (
        "accuracy",
        "KL(s||t)",
        "KL(t||s)",
        "overlap",
        "s mass",
        "t mass",
        "end",
        "time",
    ):
        table.add_column(heading, justify="right")
    for rank, row in enumerate(rows, start=1):
        table.add_row(str(rank), row.name, *_cells(row))
    table.add_row("", student.name, *_cells(student), style="dim")
    return table


def _cells(row: ProbeRow) -> list[str]:
    def fraction(value: float | None) -> str:
        return _NOT_MEASURED if value is None else human_value(value, "fraction")

    def nats(value: float | None, mark: str = "") -> str:
        return _NOT_MEASURED if value is None else mark + human_value(value)

    estimate = "" if row.exact else "~"
    bound = "" if row.exact else ">="
    return [
        fraction(row.accuracy),
        nats(row.reverse_kl, estimate),
        nats(row.forward_kl, bound),
        fraction(row.overlap),
        fraction(row.student_mass),
        fraction(row.teacher_mass),
        fraction(row.end_agreement),
        _NOT_MEASURED if row.seconds is None else human_duration(row.seconds),
    ]


def notes_of(rows: Sequence[ProbeRow], *, is_plain: bool = True) -> list[str]:
    """How to read the table, one line each.

    Args:
        is_plain: rollouts are sampled at temperature 1 without truncation.
    """
    lines = [
        "KLs in nats per token on the student's own responses; s student, t teacher; overlap and mass are of the "
        "likeliest tokens that both share; end: positions where either would end the response and both do"
    ]
    if any(not row.exact for row in rows):
        lines.append("~ estimated from the sampled tokens; >= a lower bound from the listed tokens")
        if not is_plain:
            lines.append(
                "~ compares the teachers and is no KL here: rollout.temperature, top_p, top_k or min_p favour tokens "
                "that the student is sure of"
            )
    for row in rows:
        if row.end_agreement is not None and row.end_agreement < _LOW_END_AGREEMENT:
            lines.append(
                f"teacher {row.name} ends responses elsewhere than the student ({100 * row.end_agreement:.0f}% of the "
                f"ends agree): look at the end tokens and teachers.{row.name}.aliases"
            )
    return lines


if __name__ == "__main__":
    sys.exit(run_attempt("opd_megatron.controller.probe_main", run_probe))
