"""The controller process: `python -m opd_megatron.controller.main --run-dir DIR --attempt N`.

Reads run.yaml and the newest verified commit, waits for the other processes, checks numerics, runs the service,
writes the summary and the report. Its exit code is the run's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from opd_megatron.config.overrides import leaves
from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.controller import commit, records
from opd_megatron.controller.core import Core, CoreSettings
from opd_megatron.controller.evaluation import Evaluator
from opd_megatron.controller.publishing import Publisher
from opd_megatron.controller.roles import open_roles, wait_for_learner, wait_for_servers
from opd_megatron.controller.service import Context, Service
from opd_megatron.controller.startup import check_numerics
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.data.prompts import PromptSet, load_prompts
from opd_megatron.errors import EXIT_DONE, ConfigError, OpdError
from opd_megatron.observe.console import RunConsole, demo_line
from opd_megatron.observe.report import render_report
from opd_megatron.rundir import RunDir

# What may differ between a commit and the run that goes on from it: nothing that changes what is learned.
_MAY_CHANGE = (
    "steps",
    "learner.",
    "observe.",
    "checkpoint.",
    "preflight.",
    "evaluation.every",
    "weight_sync.",
    "summary",
    "student.path",
    "data.train",
    "data.heldout",
    "batch.tokens_per_microbatch",
    "rollout.server.",
)


def fingerprint(recipe: Recipe, train: PromptSet, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What makes a run the same run: every recipe value, and the content of its data and vocabulary."""
    return {
        **leaves(recipe),
        "data.train (content)": train.content_hash,
        "student vocabulary": tokenizer.vocab_size,
    }


def may_change(keys: set[str]) -> set[str]:
    """Keys of a fingerprint that a resumed attempt may change."""
    return {
        key
        for key in keys
        if key.startswith(_MAY_CHANGE) or (key.startswith("teachers.") and ".path" not in key)
    }


def core_settings(recipe: Recipe) -> CoreSettings:
    return CoreSettings(
        steps=recipe.steps,
        prompts_per_step=recipe.batch.prompts_per_step,
        rollouts_per_prompt=recipe.batch.rollouts_per_prompt,
        evaluate_every=recipe.evaluation.every,
        save_every=recipe.checkpoint.every,
        max_bad_steps=recipe.optimizer.max_bad_steps,
        max_rejected_per_step=recipe.batch.prompts_per_step,
    )


def load_data(recipe: Recipe) -> tuple[ChatTokenizer, PromptSet, PromptSet | None]:
    """The student's tokenizer, the training prompts, the held-out prompts."""
    tokenizer = load_chat_tokenizer(Path(recipe.student.path))
    teachers = tuple(recipe.teachers)
    train = load_prompts(Path(recipe.data.train), recipe.data, teachers, tokenizer)
    heldout = None
    if recipe.data.heldout:
        path = Path(recipe.data.heldout)
        heldout = load_prompts(path, recipe.data, teachers, tokenizer, "data.heldout")
    return tokenizer, train, heldout


async def run_controller(recipe: Recipe, run: RunDir, attempt_number: int) -> None:
    """One attempt, from waiting for the roles to the report."""
    console = RunConsole(recipe.steps)
    attempt = run.attempt(attempt_number)
    began = attempt.identity.stat().st_mtime
    newest = commit.newest(run.checkpoints, console.say)
    tokenizer, train, heldout = load_data(recipe)
    marks = fingerprint(recipe, train, tokenizer)
    if newest is not None:
        commit.refuse_changes(newest, marks, may_change(set(marks) | set(newest.fingerprint)))
    core = Core(core_settings(recipe), newest.state if newest else None)
    async with AsyncExitStack() as stack:
        roles = open_roles(recipe, attempt, tokenizer.vocab_size, stack)
        await asyncio.gather(
            wait_for_servers(recipe, roles, console), wait_for_learner(recipe, roles, console)
        )
        publisher = Publisher(recipe, run, roles)
        source, path = ("commit", newest.model) if newest else ("hf", Path(recipe.student.path))
        loaded = await roles.learner.ask("load", source=source, path=str(path))
        if newest is not None:
            if loaded["optimizer_step"] != core.step:
                raise ConfigError(
                    f"{newest.path.name}: the learner is at step {loaded['optimizer_step']}, the ledger at "
                    f"{core.step}; the commit is not of one piece"
                )
            console.say(f"resumed from {newest.path.name}")
        await check_numerics(recipe, roles, publisher, train, attempt, core.version, console)
        evaluator = None
        if heldout is not None:
            evaluator = Evaluator(recipe, roles, tokenizer, heldout.prompts)
        recorded = core.step if newest is not None else -1
        book = records.Records(run, attempt_number, recorded)
        stack.callback(book.close)
        context = Context(
            recipe=recipe,
            run=run,
            attempt=attempt,
            roles=roles,
            tokenizer=tokenizer,
            train=train,
            evaluator=evaluator,
            publisher=publisher,
            records=book,
            console=console,
            fingerprint=marks,
        )
        await Service(context, core).run()
        await roles.learner.ask("stop")
    summary = records.summarize(
        recipe, run, core.ledger, train, attempt_number, time.time() - began
    )
    records.write_summary(run.summary, summary)
    report = render_report(run.root)
    console.say(f"report {report}")
    if summary["accuracy_before"] is not None and summary["kl_before"] is not None:
        console.say(demo_line(summary))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="opd_megatron.controller.main")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.run_dir)
    try:
        asyncio.run(run_controller(read_run_yaml(run.run_yaml), run, arguments.attempt))
    except OpdError as error:
        print(f"opd: {error}", flush=True)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
