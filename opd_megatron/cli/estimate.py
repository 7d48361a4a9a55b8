"""`opd estimate`: memory, seconds and GPU-hours of a recipe before anything is started."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from opd_megatron.cli.recipes import Overrides, RecipeName
from opd_megatron.config.recipe_facts import facts_of
from opd_megatron.config.recipes import resolve_recipe
from opd_megatron.config.rules import check
from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.planner.hardware import DEVICES, Device, device_named
from opd_megatron.launch.planner.memory import GIB
from opd_megatron.launch.planner.plan import (
    DEFAULT_PROMPT_TOKENS,
    NOT_MODELLED,
    NOT_MODELLED_ON_CPU,
    Plan,
    make_plan,
)
from opd_megatron.launch.planner.stages import Lengths, StepTime
from opd_megatron.launch.slurm.site import PREFIX, load_site
from opd_megatron.launch.slurm.table import RoleTable, role_table

_MIB = float(1 << 20)
_STEP_IS = {
    "sync": "one stage after the other",
    "async": "the slowest stage, sync",
    "one_step_off": "the slowest stage, or half of rollout + teacher, left + learner; sync",
}


def estimate(
    name: RecipeName,
    overrides: Overrides = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="h100, h200, gb200 or cpu. Default: as the name says.")
    ] = "",
    cluster: Annotated[
        str,
        typer.Option("--cluster", help="Site of slurm/clusters/ or a file: nodes that are taken."),
    ] = "",
    response_tokens: Annotated[
        int, typer.Option("--response-tokens", min=0, help="Mean length. Default: the limit.")
    ] = 0,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=0, help="Mean length of a prompt.")
    ] = 0,
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="Rows of the prompt file, where it is not here.")
    ] = 0,
    share_nodes: Annotated[
        bool, typer.Option("--share-nodes", help="Roles may share a node in the balanced split.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Memory by role, seconds by stage and the best split of the GPUs, from the model of docs/planner.md.

    Refuses what cannot fit, naming the term.
    """
    of_site = [o for o in overrides or [] if o.startswith(PREFIX)]
    recipe, _ = resolve_recipe(name, [o for o in overrides or [] if o not in of_site])
    check(recipe)
    site = load_site(cluster, of_site) if cluster else None
    device = device_named(_hardware(recipe, hardware))
    lengths = _lengths(recipe, prompt_tokens, response_tokens)
    if site is not None:
        device = dataclasses.replace(device, gpus_per_node=site.devices_per_node)
    plan = make_plan(recipe, device, lengths, whole_nodes=not share_nodes)
    plan = dataclasses.replace(plan, prompts=prompts or plan.prompts)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(plan), indent=1))
        return
    if site is not None:
        typer.echo(f"cluster {cluster}: {_nodes(role_table(recipe, site))}")
    for line in _lines(recipe, plan):
        typer.echo(line)


def _nodes(table: RoleTable) -> str:
    roles = ", ".join(f"{role.name} {role.nodes}" for role in table.roles if role.devices)
    return f"{table.nodes} nodes ({roles})"


def _hardware(recipe: Recipe, said: str) -> str:
    named = said or facts_of(recipe).hardware
    if named not in DEVICES and not said and recipe.device == "cuda":
        raise ConfigError.of(
            "--hardware", "", "the recipe's name does not say it", f"one of {', '.join(DEVICES)}"
        )
    return named


def _lengths(recipe: Recipe, prompt: int, response: int) -> Lengths:
    most = recipe.data.max_prompt_tokens
    return Lengths(
        prompt or min(most, DEFAULT_PROMPT_TOKENS), response or recipe.max_response_tokens
    )


def _roles(gpus: dict[str, int]) -> str:
    return ", ".join(f"{role} {number}" for role, number in gpus.items())


def _lines(recipe: Recipe, plan: Plan) -> list[str]:
    lengths = plan.lengths
    lines = [
        f"recipe {recipe.name}: {recipe.summary}",
        f"{plan.num_gpus} {'processes on a' if plan.device.is_cpu else 'x'} {plan.device.name}: {_roles(plan.gpus)}",
        f"a step: {plan.samples} samples of {lengths.prompt} + {lengths.response} tokens"
        + (
            f"; a rollout server runs {plan.time.running} sequences at once"
            if plan.time.running
            else ""
        ),
        "",
        "MiB of a process, beside what Python, torch, Megatron and SGLang take themselves"
        if plan.device.is_cpu
        else f"GiB of a GPU (of {plan.device.memory / GIB:.0f})",
    ]
    for role in plan.memory:
        unit = _MIB if plan.device.is_cpu else GIB
        terms = "  ".join(f"{name} {size / unit:.1f}" for name, size in role.terms.items())
        lines.append(f"  {role.role:<14} {role.total / unit:6.1f}  = {terms}  ({role.note})")
    lines += ["", *_stage_lines(plan.time, plan), "", *_cost_lines(plan), ""]
    return [*lines, *_balanced(plan), *_what_is_left_out(plan.device)]


def _balanced(plan: Plan) -> list[str]:
    if plan.device.is_cpu:
        return []
    best = plan.balanced
    if best.settings and best.time.step < 0.98 * plan.time.step:
        settings = " ".join(f"{key}={value}" for key, value in best.settings.items())
        return [f"balanced: {_roles(best.gpus)}: {best.time.step:,.0f} s a step; {settings}"]
    return ["balanced: no other split of these GPUs is more than 2 % faster"]


def _what_is_left_out(device: Device) -> list[str]:
    left_out = (*NOT_MODELLED_ON_CPU, *NOT_MODELLED) if device.is_cpu else NOT_MODELLED
    return ["not modelled:", *(f"  {text}" for text in left_out), _STATED]


_STATED = "a model, not a measurement: docs/planner.md has its formulas and its errors"


def _stage_lines(time: StepTime, plan: Plan) -> list[str]:
    rows = [
        ("rollout", time.rollout, plan.gpus.get("rollout", 0)),
        ("teacher" if time.overlapped else "teacher, left", _teacher(time), _teacher_gpus(plan)),
        ("learner", time.learner, plan.gpus["learner"]),
        ("sync", time.sync, 0),
        ("evaluation", time.evaluation, 0),
    ]
    each = "process" if plan.device.is_cpu else "GPU"
    lines = [f"stage           seconds  of the step   tokens/s  a {each} of the role"]
    for name, seconds, gpus in rows:
        work = time.teacher if name.startswith("teacher") else seconds
        rate = plan.tokens / work if work and gpus else 0.0
        speed = f"{rate:>10,.0f}  {rate / gpus:>10,.0f}" if rate else ""
        share = seconds / time.step
        lines.append(f"{name:<14} {_seconds(seconds):>8}  {share:>10.1%}  {speed}".rstrip())
    lines.append(
        f"{'step':<14} {_seconds(time.step):>8}  {_STEP_IS[time.mode]}; teachers work "
        f"{_seconds(time.teacher)} s in all"
    )
    return lines


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _teacher(time: StepTime) -> float:
    return time.teacher if time.overlapped else time.teacher_left


def _teacher_gpus(plan: Plan) -> int:
    return sum(n for role, n in plan.gpus.items() if role.startswith("teacher-"))


def _cost_lines(plan: Plan) -> list[str]:
    if plan.device.is_cpu:
        return [f"{plan.steps} steps: {plan.steps * plan.time.step / 60:,.1f} minutes"]
    lines = [f"GPU-hours: {plan.gpu_hours(plan.steps):,.0f} for {plan.steps} steps"]
    if plan.prompts:
        steps = plan.steps_per_epoch
        lines[0] += f", {plan.gpu_hours(steps):,.0f} for an epoch of {steps:,.0f} steps"
    else:
        lines[0] += "; those of an epoch need the prompt file, or --prompts"
    return lines
