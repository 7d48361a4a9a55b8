"""Seconds of each stage of a step, and how they make one step.

    rollout   S sequences a server, at most B at once (what the cache holds at half length): the larger of
              R t(min(S, B)) and S R t(B) / B, with t(b) a decoding step of b sequences: the larger of
              (weights + b c KV) / (decode efficiency x bandwidth) and b FLOP / (prefill efficiency x peak)
    teacher   tokens x FLOP / (prefill efficiency x peak), of all its GPUs. It scores what is finished while the student
              still writes; of the last wave of sequences, a share min(1, B / S), nothing is finished before
    learner   tokens x FLOP / published training FLOP/s, times (m + p - 1) / m for a pipeline of p stages and m
              micro-batches; teachers inside it add their forward pass
    sync      the student's bytes, written and read once (disk) or sent once (broadcast)

    step, by overlap.mode, + sync + evaluation
      sync            rollout + left + learner                      left: what of the teacher does not hide
      async           max(rollout, teacher, learner)                servers pause for new weights only
      one_step_off    max(rollout, teacher, learner, (rollout + left + learner) / 2)

One step off, the rollouts of a step and the learner begin together when new weights are there, and the next ones wait
for both. What is left of the teacher delays the learner by left - (step - rollout), what passed since the rollouts
ended; step = learner + that delay gives the last term.

Every response has the mean length here, but one reaches the limit: a rollout takes at least that many decoding steps of
one sequence. With a spread of lengths the teacher hides better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opd_megatron.config.recipe_facts import precision_of
from opd_megatron.config.schema import DRAWS, Recipe, ServerConfig
from opd_megatron.launch.planner.hardware import EFFICIENCY, Device
from opd_megatron.launch.planner.memory import MAX_RUNNING, cache_tokens, server_bytes
from opd_megatron.launch.planner.work import (
    forward_flops,
    kv_bytes,
    parameters,
    training_flops,
)
from opd_megatron.megatron.architecture import Architecture


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: int
    response: int

    @property
    def total(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Models:
    """What the roles hold. `teachers` by name, served and inside the learner."""

    student: Architecture
    teachers: dict[str, Architecture]


@dataclass(frozen=True)
class StepTime:
    """Seconds of the stages, and of the step that they make. `evaluation`: of one, divided by the steps between two.

    `mode`: overlap.mode.
    """

    rollout: float
    teacher: float
    teacher_left: float
    learner: float
    sync: float
    evaluation: float
    mode: str
    running: int

    @property
    def step(self) -> float:
        chain = self.rollout + self.teacher_left + self.learner
        slowest = max(self.rollout, self.teacher, self.learner)
        worked = {"sync": chain, "async": slowest, "one_step_off": max(slowest, chain / 2)}
        return worked[self.mode] + self.sync + self.evaluation

    @property
    def overlapped(self) -> bool:
        return self.mode != "sync"


def running_sequences(
    arch: Architecture, server: ServerConfig, device: Device, sequences: int, lengths: Lengths
) -> int:
    """Sequences that a server decodes at once."""
    room = cache_tokens(arch, server, device) / (lengths.prompt + lengths.response / 2)
    return max(1, min(sequences, int(room), MAX_RUNNING))


def decode_step_s(
    arch: Architecture, server: ServerConfig, device: Device, running: int, context: float
) -> float:
    """One decoding step of `running` sequences with `context` tokens each."""
    tp, element = server.tensor_parallel, server_bytes(server)
    read = element * parameters(arch) + running * context * kv_bytes(arch, element)
    memory_s = read / (EFFICIENCY.decode * device.bandwidth * tp)
    work_s = running * forward_flops(arch, context) / (EFFICIENCY.prefill * device.bf16_flops * tp)
    overheads = device.overheads
    return max(memory_s, work_s) + overheads.decode_step_s + running * overheads.decode_sequence_s


def rollout_s(
    arch: Architecture, server: ServerConfig, device: Device, samples: int, lengths: Lengths
) -> tuple[float, int]:
    """(seconds to generate `samples` responses on all servers, sequences that a server runs at once)."""
    each = math.ceil(samples / server.num_servers)
    running = running_sequences(arch, server, device, each, lengths)
    context = lengths.prompt + lengths.response / 2
    step_s = decode_step_s(arch, server, device, running, context)
    return lengths.response * step_s * max(1.0, each / running), running


def prefill_s(
    arch: Architecture, server: ServerConfig, device: Device, samples: int, lengths: Lengths
) -> float:
    """Seconds to score `samples` responses on all servers."""
    gpus = server.num_servers * server.tensor_parallel
    flops = samples * lengths.total * forward_flops(arch, lengths.total / 2)
    overhead_s = device.overheads.prefill_s * samples / server.num_servers
    return flops / (EFFICIENCY.prefill * device.bf16_flops * gpus) + overhead_s


def num_microbatches(recipe: Recipe, samples: int, lengths: Lengths) -> int:
    """Of one data-parallel rank: whole samples packed to at most `tokens_per_microbatch`."""
    per_microbatch = max(1, recipe.batch.tokens_per_microbatch // lengths.total)
    return math.ceil(math.ceil(samples / recipe.learner.data_parallel) / per_microbatch)


def learner_s(
    recipe: Recipe, models: Models, device: Device, samples: int, lengths: Lengths
) -> float:
    """Seconds of forward, backward and update on a step batch."""
    learner, context = recipe.learner, lengths.total / 2
    precision = precision_of(recipe)
    reached = device.training_flops.get(precision, device.training_flops["bf16"])
    each = training_flops(models.student, context, learner.recompute)
    each *= recipe.batch.updates_per_step
    inside = [models.teachers[name] for name in recipe.in_process_teachers]
    each += sum(forward_flops(teacher, context) for teacher in inside)
    micro, stages = num_microbatches(recipe, samples, lengths), learner.pipeline_parallel
    bubble = (micro + (stages - 1) / learner.virtual_pipeline) / micro
    work_s = samples * lengths.total * each * bubble / (reached * learner.world_size)
    tokens_a_rank = samples * lengths.total / learner.data_parallel
    overheads = device.overheads
    return work_s + overheads.learner_step_s + tokens_a_rank * overheads.learner_token_s


def sync_s(recipe: Recipe, models: Models, device: Device) -> float:
    """Seconds from the updated weights to servers that hold them."""
    if not recipe.uses_servers or recipe.is_supervised:
        return 0.0
    size = server_bytes(recipe.rollout.server) * parameters(models.student)
    is_disk = recipe.weight_sync.route == "disk"
    moved_s = 2 * size / EFFICIENCY.disk_bytes_s if is_disk else size / EFFICIENCY.broadcast_bytes_s
    return (moved_s if device.overheads.sync_s == 0.0 else 0.0) + device.overheads.sync_s


def step_time(recipe: Recipe, models: Models, device: Device, lengths: Lengths) -> StepTime:
    """All stages of one step."""
    samples = recipe.batch.samples_per_step
    generate = teacher = left = 0.0
    running = 0
    server = recipe.rollout.server
    if not recipe.is_supervised:
        generate, running = rollout_s(models.student, server, device, samples, lengths)
        longest = recipe.max_response_tokens
        alone_s = decode_step_s(models.student, server, device, 1, lengths.prompt + longest / 2)
        generate = max(generate, longest * alone_s)
        share = min(1.0, running * server.num_servers / samples)
        for name, config in recipe.served_teachers.items():
            arch = models.teachers[name]
            # A row, or a draw, has one teacher; a mean asks all of them, a switch at its worst the slowest.
            takes_turns = recipe.teaching.kind in ("rows", *DRAWS)
            mine = math.ceil(samples / len(recipe.teachers)) if takes_turns else samples
            spent = prefill_s(arch, config.server, device, mine, lengths)
            teacher = max(teacher, spent)
            left = max(left, spent * share, spent - generate * (1.0 - share))
    evaluation = 0.0
    if recipe.data.heldout and recipe.evaluation.every and recipe.uses_servers:
        answers = recipe.evaluation.problems * recipe.evaluation.samples_per_problem
        spent, _ = rollout_s(models.student, server, device, answers, lengths)
        evaluation = spent / recipe.evaluation.every
    return StepTime(
        rollout=generate,
        teacher=teacher,
        teacher_left=left,
        learner=learner_s(recipe, models, device, samples, lengths),
        sync=sync_s(recipe, models, device),
        evaluation=evaluation,
        mode=recipe.overlap.mode,
        running=running,
    )


def with_servers(server: ServerConfig, num_servers: int) -> ServerConfig:
    """The same servers in another number."""
    return replace(server, num_servers=num_servers)
