"""The controller process: `python -m opd_megatron.controller.main --run-dir DIR --attempt N`.

Reads run.yaml and the newest verified commit, waits for the other processes, checks numerics, runs the service,
writes the summary and the report. Its exit code is the run's.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.atomic import write_json
from opd_megatron.config.overrides import leaves
from opd_megatron.config.resume import may_change
from opd_megatron.config.schema import Recipe
from opd_megatron.controller import commit, records
from opd_megatron.controller.core import Core, CoreSettings
from opd_megatron.controller.entry import run_attempt
from opd_megatron.controller.episodes import conversations_of
from opd_megatron.controller.evaluation import Evaluator
from opd_megatron.controller.in_process import LearnerTeachers
from opd_megatron.controller.publishing import Publisher
from opd_megatron.controller.roles import Roles, open_roles, wait_for_learner, wait_for_servers
from opd_megatron.controller.samples import SampleMaker
from opd_megatron.controller.service import Context, Service
from opd_megatron.controller.startup import check_numerics
from opd_megatron.controller.stop import ended_by_stop
from opd_megatron.controller.teaching import Teaching, data_config
from opd_megatron.data.chat import ChatTokenizer, load_chat_tokenizer
from opd_megatron.data.prompts import PromptSet, load_prompts
from opd_megatron.data.tokenizer_files import tokenizer_fingerprint
from opd_megatron.errors import ConfigError
from opd_megatron.observe.console import RunConsole, result_line
from opd_megatron.observe.report import render_report
from opd_megatron.rundir import AttemptDir, RunDir
from opd_megatron.teacher.aliases import TokenAliases, aliases_of


def fingerprint(recipe: Recipe, train: PromptSet, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What makes a run the same run: every recipe value, and the content of its data and tokenizer."""
    return {
        **leaves(recipe),
        "data.train (content)": train.content_hash,
        "student vocabulary": tokenizer.vocab_size,
        # Also for an equal number of tokens: texts, ids and end tokens.
        "student tokenizer (content)": tokenizer_fingerprint(Path(recipe.student.path)).digest,
    }


def core_settings(recipe: Recipe) -> CoreSettings:
    return CoreSettings(
        steps=recipe.steps,
        prompts_per_step=recipe.batch.prompts_per_step,
        rollouts_per_prompt=recipe.batch.rollouts_per_prompt,
        evaluate_every=recipe.evaluation.every if recipe.data.heldout else 0,
        save_every=recipe.checkpoint.every,
        max_bad_steps=recipe.optimizer.max_bad_steps,
        max_rejected_per_step=recipe.batch.prompts_per_step,
        publish_always=not recipe.is_supervised,
        max_staleness=recipe.max_staleness,
        ahead=recipe.batch.prompts_per_step if recipe.overlap.mode == "one_step_off" else None,
        update_in_flight=recipe.updates_in_flight,
    )


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the student's tokenizer, prompts, token aliases by teacher, and what identifies the run."""

    tokenizer: ChatTokenizer
    train: PromptSet
    heldout: PromptSet | None
    aliases: dict[str, TokenAliases]
    fingerprint: dict[str, Any]


def load_inputs(recipe: Recipe) -> Inputs:
    """Read tokenizer and prompts."""
    tokenizer = load_chat_tokenizer(Path(recipe.student.path), thinking=recipe.data.thinking)
    teachers = tuple(recipe.teachers)
    train = load_prompts(
        Path(recipe.data.train),
        data_config(recipe, tokenizer),
        teachers,
        tokenizer,
        max_response_tokens=recipe.rollout.max_new_tokens if recipe.is_supervised else None,
    )
    heldout = None
    if recipe.data.heldout:
        path = Path(recipe.data.heldout)
        heldout = load_prompts(
            path, data_config(recipe, tokenizer), teachers, tokenizer, "data.heldout"
        )
    marks = fingerprint(recipe, train, tokenizer)
    return Inputs(tokenizer, train, heldout, aliases_of(recipe), marks)


async def run_controller(recipe: Recipe, run: RunDir, attempt_number: int) -> None:
    """One attempt, from waiting for the roles to the report."""
    console = RunConsole(recipe.steps)
    attempt = run.attempt(attempt_number)
    began = attempt.identity.stat().st_mtime
    # In a thread: hashing a large commit or reading many prompts must not stop the heartbeat.
    newest = await asyncio.to_thread(commit.newest, run.checkpoints, console.say)
    inputs = await asyncio.to_thread(load_inputs, recipe)
    account = records.account_for_inputs(inputs.train, inputs.heldout)
    write_json(run.inputs, account)
    for line in records.input_lines(account):
        console.say(line)
    if newest is not None:
        marks = inputs.fingerprint
        commit.refuse_changes(newest, marks, may_change(set(marks) | set(newest.fingerprint)))
    core = Core(core_settings(recipe), newest.state if newest else None)
    if not core.nothing_left:
        await _train(recipe, run, attempt_number, console, core, newest, inputs)
    # All work is committed: from here on the supervisor minds no other process.
    attempt.finishing.touch()
    summary = records.summarize(recipe, run, core.ledger, attempt_number, time.time() - began)
    records.write_summary(run.summary, summary)
    report = render_report(run.root)
    console.say(f"report {report}")
    if summary["accuracy_before"] is not None:
        console.say(result_line(summary))


async def _bring_up(
    recipe: Recipe,
    run: RunDir,
    attempt: AttemptDir,
    console: RunConsole,
    core: Core,
    newest: commit.Commit | None,
    roles: Roles,
    train: PromptSet,
) -> Publisher:
    """Wait for the roles, bring everyone to the commit's weights, check numerics."""
    await asyncio.gather(
        wait_for_servers(recipe, roles, console), wait_for_learner(recipe, roles, console)
    )
    publisher = Publisher(recipe, run, roles, console)
    source, path = ("commit", newest.model) if newest else ("hf", Path(recipe.student.path))
    loaded = await roles.learner.ask("load", source=source, path=str(path))
    if newest is not None:
        if loaded["optimizer_step"] != core.step:
            raise ConfigError(
                f"{newest.path.name}: the learner is at step {loaded['optimizer_step']}, the ledger at "
                f"{core.step}; the commit is not of one piece"
            )
        console.say(f"resumed from {newest.path.name}")
    if recipe.uses_servers:
        await check_numerics(recipe, roles, publisher, train, attempt, core.version, console)
    return publisher


async def _train(
    recipe: Recipe,
    run: RunDir,
    attempt_number: int,
    console: RunConsole,
    core: Core,
    newest: commit.Commit | None,
    inputs: Inputs,
) -> None:
    """Bring the roles up and run the service to its end."""
    attempt = run.attempt(attempt_number)
    tokenizer, train, aliases = inputs.tokenizer, inputs.train, inputs.aliases
    async with AsyncExitStack() as stack:
        roles = open_roles(recipe, attempt, tokenizer.vocab_size, stack, console.say)
        async with ended_by_stop(attempt):
            publisher = await _bring_up(recipe, run, attempt, console, core, newest, roles, train)
        attempt.serving.touch()
        evaluator = None
        if inputs.heldout is not None:
            inside = LearnerTeachers(roles.learner, attempt.batches)
            prompts = inputs.heldout.prompts
            evaluator = Evaluator(recipe, roles, tokenizer, prompts, aliases, inside)
            for line in evaluator.not_measured():
                console.say(line)
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
            teaching=Teaching(recipe, roles, tokenizer, aliases),
            sample_maker=SampleMaker(recipe, tokenizer, aliases),
            conversations=conversations_of(recipe, tokenizer),
            records=book,
            console=console,
            fingerprint=inputs.fingerprint,
        )
        await Service(context, core).run()
        # Before the learner is told, so that its end is never taken for a death.
        attempt.finishing.touch()
        roles.learner.tell_to_stop()


if __name__ == "__main__":
    sys.exit(run_attempt("opd_megatron.controller.main", run_controller))
