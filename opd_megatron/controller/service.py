"""The controller's shell: does what the core asks for, with real servers, the real learner and real files.

Every action runs as a task; its event goes into one queue; the core is fed from that queue by one loop, so it needs
no locks. An error that is not about one prompt ends the run: it propagates out of `run`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from opd_megatron.config.schema import Recipe
from opd_megatron.controller import protocol, records
from opd_megatron.controller.alarms import Alarms
from opd_megatron.controller.committing import Committer
from opd_megatron.controller.core import Core
from opd_megatron.controller.episodes import Conversations
from opd_megatron.controller.evaluation import Evaluator
from opd_megatron.controller.generation import generate_group, sampling_of
from opd_megatron.controller.given import given_rollout, given_scores
from opd_megatron.controller.grace import GraceWatch
from opd_megatron.controller.publishing import Publisher
from opd_megatron.controller.roles import Roles
from opd_megatron.controller.samples import SampleMaker
from opd_megatron.controller.stop import WATCH_NAME, refuse_if_fenced, watch_for_stop
from opd_megatron.controller.stopwatch import LEARNER_FIRST, STAGES, Stopwatch
from opd_megatron.controller.teaching import Teaching, teaching_metrics
from opd_megatron.data.chat import ChatTokenizer
from opd_megatron.data.prompts import PromptSet
from opd_megatron.errors import (
    ContractError,
    NumericsError,
    OpdError,
    Preempted,
    RequestRefused,
    RoleDied,
)
from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.observe.console import RunConsole
from opd_megatron.observe.waiting import WaitNotice
from opd_megatron.rundir import AttemptDir, RunDir
from opd_megatron.types import Prompt, Rollout, Sample, TeacherScores

Work = Callable[[Any], Awaitable[protocol.Event]]
_MEMORY_EVERY = 10  # steps; reading every process's memory map costs tens of milliseconds


@dataclass(frozen=True)
class Context:
    """What a run consists of; made once by `main`."""

    recipe: Recipe
    run: RunDir
    attempt: AttemptDir
    roles: Roles
    tokenizer: ChatTokenizer
    train: PromptSet
    evaluator: Evaluator | None
    publisher: Publisher
    teaching: Teaching
    sample_maker: SampleMaker
    conversations: Conversations | None
    records: records.Records
    console: RunConsole
    fingerprint: dict[str, object]


class Service:
    """Runs one attempt from `Started` to `Finish`."""

    def __init__(self, context: Context, core: Core) -> None:
        self.context = context
        self.core = core
        self._events: asyncio.Queue[protocol.Event | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sampling = sampling_of(context.recipe.rollout)
        self._alarms = Alarms(context.recipe.alarms, context.console.say)
        self._overlaps = context.recipe.overlap.mode != "sync"
        self._watch = Stopwatch(LEARNER_FIRST if self._overlaps else STAGES)
        self._evaluating = False
        self._samples: tuple[Sample, ...] = ()
        self._chosen_at: dict[int, int] = {}  # step, by position
        self._checkpoint_s = self._commit_s = self._eval_s = 0.0
        self._perf: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._latencies: list[float] = []
        recipe, train = context.recipe, context.train
        self._committer = Committer(
            context.run.checkpoints,
            context.roles.learner,
            context.fingerprint,
            recipe.checkpoint,
            self._events.put_nowait,
            self._committed,
        )
        self._grace = GraceWatch(context.attempt.grace_s, context.console.say)
        self._order = train.order(recipe.data, recipe.seed)

    async def run(self) -> None:
        """Feed the core until it finishes.

        Raises:
            OpdError: whatever ended the run early.
        """
        self._tasks.add(self._watch_for_stop())
        try:
            event: protocol.Event | BaseException = protocol.Started()
            while not self._do(self.core.on(event)):
                async with WaitNotice(
                    f"step {self.core.step + 1}", self._pending, self.context.console.say
                ):
                    event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
            await self._committer.settle()
        finally:
            self._committer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _watch_for_stop(self) -> asyncio.Task[None]:
        watching = watch_for_stop(self.context.attempt, self._events.put)
        return asyncio.create_task(watching, name=WATCH_NAME)

    def _pending(self) -> str:
        names = sorted({task.get_name() for task in self._tasks} - {WATCH_NAME})
        return ", ".join(names) or "nothing"

    def _prompt(self, position: int) -> Prompt:
        return self.context.train.prompts[self._order.index_at(position)[1]]

    def _do(self, actions: list[protocol.Action]) -> bool:
        """Start every action; True when the run is over."""
        for action in actions:
            match action:
                case protocol.RecordStep():
                    self._record(action)
                case protocol.Finish():
                    return True
                case protocol.Suspend():
                    raise Preempted(f"asked to stop: committed at step {self.core.step}")
                case protocol.Abort(message, retryable):
                    raise RoleDied(message) if retryable else NumericsError(message)
                case _:
                    self._start(action)
        return False

    def _start(self, action: protocol.Action) -> None:
        work = {
            protocol.Generate: ("rollout servers", self._generate),
            protocol.Score: ("teacher servers", self._score),
            protocol.Train: ("learner (train)", self._train),
            protocol.SyncWeights: ("learner (publish) and rollout servers", self._sync),
            protocol.Evaluate: ("evaluation", self._evaluate),
            protocol.Save: ("learner (save)", self._save),
        }
        name, function = work[type(action)]
        idle = self._watch.start is None and not self._evaluating
        if isinstance(action, protocol.Generate) and idle:
            self._watch.begin()
        task = asyncio.create_task(self._report(function, action), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self, function: Work, action: protocol.Action) -> None:
        try:
            event = await function(action)
        except OpdError as error:
            event = error
        except Exception as error:
            error.add_note(f"while doing {type(action).__name__}")
            event = error
        await self._events.put(event)

    # ------------------------------------------------------------ one group

    async def _generate(self, action: protocol.Generate) -> protocol.Event:
        position, attempt = action.position, action.attempt
        prompt = self._prompt(position)
        epoch = self._order.index_at(position)[0]
        count = self.context.recipe.batch.rollouts_per_prompt
        if self.context.recipe.is_supervised:
            given = given_rollout(prompt, f"{prompt.id}@{epoch}#0", self.core.version)
            return protocol.Generated(position, attempt, (given,))
        teaching = self.context.teaching
        # The teacher of a schedule is chosen when the student is asked, also where steps go by until it is scored.
        self._chosen_at[position] = self.core.step
        asked, num_control = teaching.prompt_for(prompt, position, self.core.step)
        try:
            with self._watch.stage("rollout"):
                names = [f"{prompt.id}@{epoch}#{k}" for k in range(count)]
                rollouts = await self._rollouts(asked, names, attempt, num_control)
        except RequestRefused as error:
            return protocol.PromptFailed(position, attempt, "refused", str(error))
        except ContractError as error:
            return protocol.PromptFailed(position, attempt, "contract", str(error))
        return protocol.Generated(position, attempt, rollouts)

    async def _rollouts(
        self, prompt: Prompt, names: list[str], attempt: int, num_control: int
    ) -> tuple[Rollout, ...]:
        """One rollout a name: one response, or a conversation with the recipe's environment."""
        servers, conversations = self.context.roles.rollout, self.context.conversations
        if conversations is not None:
            return await conversations.generate(
                servers, prompt, self._sampling, names, attempt, num_control
            )
        topk = self.context.teaching.wanted.student_topk
        return await generate_group(
            servers, prompt, self._sampling, names, attempt, topk, num_control
        )

    async def _score(self, action: protocol.Score) -> protocol.Event:
        position, attempt, rollouts = action.position, action.attempt, action.rollouts
        if self.context.recipe.is_supervised:
            scores = [given_scores(rollout) for rollout in rollouts]
            samples = self.context.sample_maker.make(self._prompt(position), rollouts, scores)
            return protocol.Scored(position, attempt, samples)
        teaching = self.context.teaching
        target = teaching.target(self._prompt(position), position, self._chosen_at[position])
        if teaching.is_inside(target):
            return await self._samples_of(action, teaching.unscored(target, rollouts))
        try:
            with self._watch.stage("teacher"):
                scores = await teaching.score(target, rollouts)
        except RequestRefused as error:
            return protocol.PromptFailed(position, attempt, "refused", str(error))
        except ContractError as error:
            return protocol.PromptFailed(position, attempt, "contract", str(error))
        return await self._samples_of(action, scores)

    async def _samples_of(
        self, action: protocol.Score, scores: Sequence[TeacherScores]
    ) -> protocol.Event:
        make = self.context.sample_maker.make
        prompt = self._prompt(action.position)
        samples = await asyncio.to_thread(make, prompt, action.rollouts, scores)
        return protocol.Scored(action.position, action.attempt, samples)

    # ------------------------------------------------------------ the step

    async def _train(self, action: protocol.Train) -> protocol.Event:
        batch = self.context.attempt.batches / f"step_{action.step:06d}.safetensors"
        # In a thread: rollouts and scores of later steps go on, and so does the heartbeat.
        await asyncio.to_thread(write_batch, batch, action.step, action.version, action.samples)
        # Every request is answered by now; what a teacher inside the learner takes is no latency.
        self._latencies = sorted(self._watch.durations("teacher"))
        answer = await self.context.roles.learner.ask(
            "train",
            batch=str(batch),
            out=str(diagnostics_path(batch)),
        )
        end = time.monotonic()
        timings = answer["timings"]
        worked = timings["forward_backward_s"] + timings["optimizer_s"]
        self._watch.add("learner", end - worked, end)
        if "teacher_s" in timings:
            self._watch.add("teacher", end - worked - timings["teacher_s"], end - worked)
        self._samples = action.samples
        for position in action.positions:
            self._chosen_at.pop(position, None)
        if not answer["applied"]:
            kept = keep_refused(batch)
            self.context.console.say(
                f"step {action.step} not applied: {answer['why_not_applied']}; its batch is kept at {kept}"
            )
            if not self._overlaps:
                self._watch.start = None
        return protocol.Trained(
            action.step, answer["applied"], answer["why_not_applied"], answer["metrics"]
        )

    async def _sync(self, action: protocol.SyncWeights) -> protocol.Event:
        with self._watch.stage("publish"):
            published = await self.context.publisher.publish(action.version)
        with self._watch.stage("sync"):
            await self.context.publisher.push(published)
        return protocol.Synced(action.version)

    async def _evaluate(self, action: protocol.Evaluate) -> protocol.Event:
        self._end_step()
        self._evaluating = True
        if self.context.evaluator is None:
            return protocol.Evaluated(action.step)
        begin = time.monotonic()
        metrics = await self.context.evaluator.evaluate(with_teacher=action.step == 0)
        self._eval_s = time.monotonic() - begin
        return protocol.Evaluated(action.step, {**metrics, "perf/eval_s": self._eval_s})

    async def _save(self, action: protocol.Save) -> protocol.Event:
        begin = time.monotonic()
        refuse_if_fenced(self.context.attempt)
        await self._committer.make(action.step, action.state)
        self._checkpoint_s = time.monotonic() - begin
        if self._overlaps:  # Rollouts went on meanwhile, but a step takes no longer for a commit.
            self._watch.begin()
        return protocol.Saved(action.step)

    def _committed(self, seconds: float) -> None:
        self._commit_s = seconds
        self._grace.committed(seconds, self._perf, self._eval_s)

    # ------------------------------------------------------------ what is written

    def _end_step(self) -> None:
        """Stop the step's clock; evaluation and records are not part of the step."""
        if self._watch.start is not None:
            self._perf, self._busy = self._watch.end()

    def _record(self, action: protocol.RecordStep) -> None:
        context, step = self.context, action.step
        self._end_step()
        self._evaluating = False
        if self._overlaps and step > 0:  # The rollouts of the next step are under way.
            self._watch.begin()
        metrics = dict(action.metrics)
        trained = [(position, self._prompt(position)) for position in action.positions]
        if trained:
            metrics |= self._perf | records.length_metrics(self._samples)
            metrics |= records.speed_metrics(self._samples, self._perf, self._busy)
            if not context.recipe.is_supervised:
                metrics |= records.age_metrics(self._samples, step - 1)
                metrics |= teaching_metrics(self._samples, context.recipe.teachers)
            if self._latencies:
                metrics["teacher/latency_p95_s"] = self._latencies[
                    int(0.95 * (len(self._latencies) - 1))
                ]
        if self._checkpoint_s:
            metrics["perf/checkpoint_s"], self._checkpoint_s = self._checkpoint_s, 0.0
        if self._commit_s:
            metrics["perf/commit_s"], self._commit_s = self._commit_s, 0.0
        epoch = self._order.index_at(max(0, self.core.ledger.issued - 1))[0]
        metrics |= context.roles.server_metrics()
        metrics |= records.ledger_metrics(self.core.ledger, epoch)
        if step % _MEMORY_EVERY == 0:
            metrics["memory/peak_rss_gib"] = records.memory_in_use_gib()
        row = context.records.step(step, metrics, trained)
        context.console.step(row)
        if trained:
            if not context.recipe.is_supervised:
                self._alarms.check(step, row)
            self._show_rollouts(step, {prompt.id: prompt for _, prompt in trained})
            self._discard_batches(step)
            self._samples = ()  # With a top-K they are gigabytes.

    def _show_rollouts(self, step: int, prompts: dict[str, Prompt]) -> None:
        observe, recipe = self.context.recipe.observe, self.context.recipe
        show = observe.show_rollout_every > 0 and step % observe.show_rollout_every == 0
        first_steps = step <= max(1, observe.report_rollouts // 2)
        keep = first_steps or step > recipe.steps - max(1, observe.report_rollouts // 2)
        if not (show or (keep and observe.report_rollouts > 0)):
            return
        batch = self.context.attempt.batches / f"step_{step:06d}.safetensors"
        tokens = load_file(diagnostics_path(batch))
        # A different group each time, always its first sample: no choosing of pretty ones.
        count = recipe.batch.rollouts_per_prompt
        index = (step * count) % len(self._samples) // count * count
        colored = records.colored_rollout(
            step,
            index,
            self._samples,
            prompts[self._samples[index].rollout.prompt_id],
            tokens["advantages"],
            tokens["weights"],
            self.context.tokenizer,
            self.context.evaluator.grader if self.context.evaluator else None,
        )
        self.context.records.rollouts.append(colored.to_record())
        if show:
            self.context.console.rollout(colored)

    def _discard_batches(self, step: int) -> None:
        """Batches of trained steps have served; those of refused steps were moved away (`keep_refused`)."""
        batch = self.context.attempt.batches / f"step_{step:06d}.safetensors"
        batch.unlink(missing_ok=True)
        diagnostics_path(batch).unlink(missing_ok=True)


def keep_refused(batch: Path) -> Path:
    """Move the batch of a step that was not applied out of the way of the next try for that step."""
    number = len(list(batch.parent.glob(f"refused_*_{batch.name}"))) + 1
    return batch.rename(batch.with_name(f"refused_{number}_{batch.name}"))


def diagnostics_path(batch: Path) -> Path:
    """Where the learner writes the per-token results of a batch."""
    return batch.with_suffix(".tokens.safetensors")
