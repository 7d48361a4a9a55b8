"""`opd eval` as a process: servers only, no learner. Writes eval.json and prints what it measured."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from opd_megatron.atomic import write_json
from opd_megatron.config.run_yaml import read_run_yaml
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.evaluation import Evaluator
from opd_megatron.controller.roles import open_roles, wait_for_servers
from opd_megatron.data.chat import load_chat_tokenizer
from opd_megatron.data.prompts import load_prompts
from opd_megatron.errors import EXIT_DONE, OpdError
from opd_megatron.observe.console import RunConsole
from opd_megatron.rundir import RunDir


async def run_evaluation(recipe: Recipe, run: RunDir, attempt: int) -> None:
    console = RunConsole(recipe.steps)
    tokenizer = load_chat_tokenizer(Path(recipe.student.path))
    heldout = load_prompts(
        Path(recipe.data.heldout), recipe.data, tuple(recipe.teachers), tokenizer, "data.heldout"
    )
    async with AsyncExitStack() as stack:
        roles = open_roles(recipe, run.attempt(attempt), tokenizer.vocab_size, stack)
        await wait_for_servers(recipe, roles, console)
        evaluator = Evaluator(recipe, roles, tokenizer, heldout.prompts)
        metrics = await evaluator.evaluate(with_teacher=True)
    settings = recipe.evaluation
    console.say(
        f"{min(settings.problems, len(heldout))} problems x {settings.samples_per_problem} samples, "
        f"temperature {settings.temperature:g}, at most {recipe.rollout.max_new_tokens} new tokens"
    )
    for name, value in metrics.items():
        console.say(f"{name} {value:.4f}")
    write_json(run.root / "eval.json", {"model": recipe.student.path, **metrics})
    console.say(f"wrote {run.root / 'eval.json'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="opd_megatron.controller.evaluate_main")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.run_dir)
    try:
        asyncio.run(run_evaluation(read_run_yaml(run.run_yaml), run, arguments.attempt))
    except OpdError as error:
        print(f"opd: {error}", flush=True)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
