"""`opd eval` as a process: servers only, no learner. Writes eval.json and prints what it measured."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

from opd_megatron.atomic import write_json
from opd_megatron.config.schema import Recipe
from opd_megatron.controller.entry import run_attempt
from opd_megatron.controller.evaluation import Evaluator
from opd_megatron.controller.roles import open_roles, wait_for_servers
from opd_megatron.controller.teaching import data_config
from opd_megatron.data.chat import load_chat_tokenizer
from opd_megatron.data.prompts import load_prompts
from opd_megatron.observe.console import RunConsole
from opd_megatron.observe.formats import human_value
from opd_megatron.observe.metric_table import find_metric
from opd_megatron.rundir import RunDir
from opd_megatron.teacher.aliases import aliases_of


async def run_evaluation(recipe: Recipe, run: RunDir, attempt: int) -> None:
    console = RunConsole(recipe.steps)
    tokenizer = load_chat_tokenizer(Path(recipe.student.path), thinking=recipe.data.thinking)
    data = data_config(recipe, tokenizer)
    heldout = load_prompts(
        Path(recipe.data.heldout), data, tuple(recipe.teachers), tokenizer, "data.heldout"
    )
    async with AsyncExitStack() as stack:
        files = run.attempt(attempt)
        roles = open_roles(recipe, files, tokenizer.vocab_size, stack, console.say)
        await wait_for_servers(recipe, roles, console)
        evaluator = Evaluator(recipe, roles, tokenizer, heldout.prompts, aliases_of(recipe))
        for line in evaluator.not_measured():
            console.say(line)
        metrics = await evaluator.evaluate(with_teacher=True)
    settings = {
        "problems": min(recipe.evaluation.problems, len(heldout)),
        "samples_per_problem": recipe.evaluation.samples_per_problem,
        "temperature": recipe.evaluation.temperature,
        "top_p": recipe.evaluation.top_p,
        "top_k": recipe.evaluation.top_k,
        "min_p": recipe.evaluation.min_p,
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "grader": recipe.evaluation.grader,
        "kl_problems": recipe.evaluation.kl_problems,
    }
    console.say(" ".join(f"{name}={value}" for name, value in settings.items()))
    for name, value in metrics.items():
        metric = find_metric(name)
        assert metric is not None, name
        console.say(f"{name} {human_value(value, metric.unit)}")
    write_json(
        run.root / "eval.json", {"model": recipe.student.path, "settings": settings, **metrics}
    )
    console.say(f"wrote {run.root / 'eval.json'}")


if __name__ == "__main__":
    sys.exit(run_attempt("opd_megatron.controller.evaluate_main", run_evaluation))
