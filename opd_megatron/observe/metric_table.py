"""The table of every metric of a run: name, unit, reduction, who measures it, what it means.

`reduction` says how the values of the tokens, samples, micro-batches and ranks of one step become
the one value of the step. Add a row here, then `python -m opd_megatron.observe.metrics >
docs/metrics.md`. Left out: metrics of objectives and layouts that this version does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Reduction(Enum):
    """How several values become one."""

    MEAN = "Mean"
    MAX = "Max"
    SUM = "Sum"
    LAST = "Last"

    def reduce(self, values: Sequence[float], weights: Sequence[float] | None = None) -> float:
        """Reduce a non-empty list.

        Args:
            values: in the order they were measured.
            weights: token or sample counts for `MEAN`, equal when None; the others ignore them.
        """
        if self is Reduction.MAX:
            return max(values)
        if self is Reduction.SUM:
            return math.fsum(values)
        if self is Reduction.LAST:
            return values[-1]
        counts = [1.0] * len(values) if weights is None else list(weights)
        return math.fsum(v * n for v, n in zip(values, counts, strict=True)) / math.fsum(counts)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. `source` is the part of the system that measures it."""

    name: str
    unit: str
    reduction: Reduction
    source: str
    meaning: str


_MEAN, _MAX, _SUM, _LAST = Reduction.MEAN, Reduction.MAX, Reduction.SUM, Reduction.LAST
_LEARNER, _CONTROLLER, _TEACHER = "learner", "controller", "teacher scoring"
_EVAL, _ROLLOUT, _LEDGER = "evaluation", "rollout", "prompt ledger"

# fmt: off
METRICS: tuple[Metric, ...] = (
    # What is trained.
    Metric("train/loss", "nats^2", _MEAN, _LEARNER,
           "Policy-gradient surrogate per token, -weight * advantage * student log-prob with "
           "advantage and weight detached; only its gradient has a meaning, so judge a run by the "
           "KLs."),
    Metric("train/kl_reverse", "nats/token", _MEAN, _LEARNER,
           "Estimate of KL(student || teacher) from the sampled tokens of the step, the mean of "
           "log pi - log q; noise can make it negative."),
    Metric("train/kl_forward", "nats/token", _MEAN, _LEARNER,
           "Estimate of KL(teacher || student) from the same student tokens, the mean of (q/pi) "
           "log(q/pi); noisy where the teacher likes what the student rarely says."),
    Metric("train/entropy", "nats", _MEAN, _LEARNER,
           "Entropy of the student's next-token distribution at the response positions, over the "
           "whole vocabulary."),
    Metric("train/grad_norm", "1", _LAST, _LEARNER,
           "Global L2 norm of the gradient over all ranks, before clipping."),
    Metric("train/lr", "1", _LAST, _LEARNER,
           "Learning rate that the optimizer used."),
    Metric("train/advantage_mean", "nats", _MEAN, _LEARNER,
           "Mean advantage, log q - log pi of the sampled tokens for reverse KL; rises to 0 as "
           "the student reaches the teacher."),
    Metric("train/advantage_abs_max", "nats", _MAX, _LEARNER,
           "Largest advantage of the step in absolute value: the token on which the models "
           "disagree most."),
    Metric("train/tokens", "tokens", _SUM, _LEARNER,
           "Response tokens in the loss: the divisor of the loss, over all ranks and micro- "
           "batches."),
    Metric("train/skipped", "steps", _SUM, _LEARNER,
           "1 when the update was not applied because of a non-finite value, else 0."),
    # How far the data is from the policy that is trained.
    Metric("offpolicy/age_mean", "versions", _MEAN, _CONTROLLER,
           "Weight versions between the policy that wrote a sample and the one being trained; 0 "
           "is strictly on-policy."),
    Metric("offpolicy/age_max", "versions", _MAX, _CONTROLLER,
           "The oldest sample of the step, in weight versions."),
    Metric("offpolicy/logprob_diff_mean", "nats", _MEAN, _LEARNER,
           "Mean |log-prob by the learner - log-prob by the rollout server| of the sampled "
           "tokens."),
    Metric("offpolicy/logprob_diff_max", "nats", _MAX, _LEARNER,
           "Largest such difference; a jump means that the two engines do not hold the same "
           "weights."),
    Metric("offpolicy/masked_frac", "fraction", _MEAN, _LEARNER,
           "Share of response tokens whose importance ratio left the trusted interval, so that "
           "they do not train."),
    Metric("offpolicy/truncated_frac", "fraction", _MEAN, _LEARNER,
           "Share of response tokens whose importance weight was cut to the trusted interval "
           "(truncated importance sampling only)."),
    Metric("offpolicy/ppl_drift", "ratio", _MEAN, _LEARNER,
           "Perplexity of the samples under the rollout server divided by that under the learner; "
           "1 means the engines agree."),
    # What the student writes.
    Metric("rollout/len_mean", "tokens", _MEAN, _ROLLOUT,
           "Mean response length, the end token included."),
    Metric("rollout/truncated_frac", "fraction", _MEAN, _ROLLOUT,
           "Share of responses cut at the token limit instead of ended by the student."),
    Metric("rollout/tokens_per_s", "tokens/s", _MEAN, _ROLLOUT,
           "Response tokens generated per second of perf/rollout_s, all servers together."),
    # What the teachers answer.
    Metric("teacher/latency_p95_s", "s", _MAX, _TEACHER,
           "95th percentile of the time from request to scores, one request per sequence."),
    Metric("teacher/tokens_per_s", "tokens/s", _MEAN, _TEACHER,
           "Prompt and response tokens scored per second of perf/teacher_s."),
    Metric("teacher/error_frac", "fraction", _MEAN, _TEACHER,
           "Share of scoring requests that failed and were sent again."),
    # Where the time goes. The stages add up to perf/step_s.
    Metric("perf/step_s", "s", _SUM, _CONTROLLER,
           "Wall time of the step, from the first request until the servers hold the new weights; "
           "evaluation is not part of it."),
    Metric("perf/rollout_s", "s", _SUM, _CONTROLLER,
           "Time until the last response was there."),
    Metric("perf/teacher_s", "s", _SUM, _CONTROLLER,
           "Time from the last response until the last teacher score was there."),
    Metric("perf/learner_s", "s", _SUM, _LEARNER,
           "Forward, backward and optimizer, as measured by the learner."),
    Metric("perf/publish_s", "s", _SUM, _CONTROLLER,
           "Writing the new weights as a Hugging Face directory."),
    Metric("perf/sync_s", "s", _SUM, _CONTROLLER,
           "Loading the new weights into the rollout servers and checking that they hold them."),
    Metric("perf/checkpoint_s", "s", _SUM, _CONTROLLER,
           "Writing and committing a checkpoint, 0 at steps without one."),
    Metric("perf/other_s", "s", _SUM, _CONTROLLER,
           "The rest of the step: batches, files, waiting for the mailbox."),
    Metric("perf/outside_model_frac", "fraction", _MEAN, _CONTROLLER,
           "Share of perf/step_s that is neither generation nor scoring nor learning."),
    Metric("perf/learner_tokens_per_s", "tokens/s", _MEAN, _LEARNER,
           "Response tokens trained per second of perf/learner_s."),
    Metric("perf/eval_s", "s", _SUM, _EVAL,
           "Wall time of the evaluation after the step, not part of perf/step_s."),
    # How good the student is on held-out prompts.
    Metric("eval/heldout/accuracy", "fraction", _MEAN, _EVAL,
           "Mean share of right answers over problems and samples (mean@n) at the evaluation "
           "temperature."),
    Metric("eval/heldout/best_of_n", "fraction", _MEAN, _EVAL,
           "Share of problems with at least one right answer among the n samples."),
    Metric("eval/heldout/truncated_frac", "fraction", _MEAN, _EVAL,
           "Share of held-out responses cut at the token limit."),
    Metric("eval/heldout/len_mean", "tokens", _MEAN, _EVAL,
           "Mean held-out response length, the end token included."),
    Metric("eval/heldout/kl_reverse", "nats/token", _MEAN, _EVAL,
           "Exact KL(student || teacher) over the whole vocabulary at the tokens of held-out "
           "rollouts."),
    Metric("eval/heldout/kl_forward", "nats/token", _MEAN, _EVAL,
           "Exact KL(teacher || student) over the whole vocabulary at the same tokens."),
    Metric("eval/heldout/teacher_accuracy", "fraction", _LAST, _EVAL,
           "The teacher's own accuracy on the same problems with the same settings: the line to "
           "reach."),
    # What happened to the prompts. issued = trained + rejected + in_flight at every commit.
    Metric("data/epoch", "epochs", _LAST, _LEDGER,
           "Passes over the training prompts that were begun, counted from 0."),
    Metric("data/prompts_issued", "prompts", _LAST, _LEDGER,
           "Prompts handed out since the start of the run."),
    Metric("data/prompts_trained", "prompts", _LAST, _LEDGER,
           "Prompts whose step was applied, each counted once."),
    Metric("data/prompts_rejected", "prompts", _LAST, _LEDGER,
           "Prompts given up for a recorded reason."),
    Metric("data/prompts_in_flight", "prompts", _LAST, _LEDGER,
           "Prompts handed out and not yet trained or rejected."),
    # Resources.
    Metric("memory/peak_rss_gib", "GiB", _MAX, _CONTROLLER,
           "Resident memory of all processes of the run together, the highest seen so far."),
)
# fmt: on

METRICS_BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}
