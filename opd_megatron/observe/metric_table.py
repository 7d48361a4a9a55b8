"""The table of every metric of a run: name, unit, reduction, who measures it, what it means.

`reduction` says how the values of the tokens, samples, micro-batches and ranks of one step become
the one value of the step. A name that ends with `<teacher>` stands for one series a teacher. Add a row here, then
`python -m opd_megatron.observe.metrics >
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

# Response positions of train/log_ratio_at, as the learner counts them from 0.
POSITION_BUCKETS = ("0-15", "16-63", "64-255", "256-1023", "1024-4095", "4096+")

# fmt: off
METRICS: tuple[Metric, ...] = (
    # What is trained.
    Metric("train/loss", "nats^2", _MEAN, _LEARNER,
           "Policy-gradient surrogate per token, -weight * advantage * student log-prob with "
           "advantage and weight detached; only its gradient has a meaning, so judge a run by the "
           "KLs."),
    Metric("train/cross_entropy", "nats/token", _MEAN, _LEARNER,
           "Mean of -log pi over the tokens of the given responses (objective.estimator=cross_entropy "
           "only); its floor is the entropy of the data."),
    Metric("train/kl_reverse", "nats/token", _MEAN, _LEARNER,
           "Estimate of KL(student || teacher) from the sampled tokens of the step, the mean of "
           "log pi - log q; noise can make it negative."),
    Metric("train/kl_forward", "nats/token", _MEAN, _LEARNER,
           "Estimate of KL(teacher || student) from the same student tokens, the mean of u log u - u "
           "+ 1 with u = q/pi; never negative, noisy where the teacher likes what the student rarely "
           "says."),
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
           "Response tokens in the loss: the divisor of the loss, over all ranks and "
           "micro-batches."),
    Metric("train/skipped", "updates", _SUM, _CONTROLLER,
           "Updates not applied because of a non-finite value before the one of this step; their "
           "prompts are rejected as step_not_applied."),
    Metric("train/updates", "updates", _SUM, _LEARNER,
           "Optimizer updates on the batch of the step; fewer than batch.updates_per_step when one "
           "was refused for a non-finite value."),
    Metric("train/clipped_frac", "fraction", _MEAN, _LEARNER,
           "Share of tokens whose gradient PPO's bounds took away in the last update of the step "
           "(batch.updates_per_step > 1 only)."),
    Metric("train/special_masked_frac", "fraction", _MEAN, _LEARNER,
           "Share of response tokens that do not train for what they are: special tokens "
           "(objective.mask_special_tokens), aliased tokens inside a response."),
    Metric("train/filter_kept_frac", "fraction", _MEAN, _LEARNER,
           "Share of the remaining tokens that passed the recipe's filter."),
    Metric("train/whitening_mean", "1", _MEAN, _LEARNER,
           "What whitening subtracted: mean over its sets of their mean before."),
    Metric("train/whitening_std", "1", _MEAN, _LEARNER,
           "What whitening divided by: mean over its sets of their standard deviation before."),
    Metric("train/support_divergence", "nats", _MEAN, _LEARNER,
           "Divergence over the support, per token; for topk_surrogate its value has no meaning."),
    Metric("train/support_student_mass", "fraction", _MEAN, _LEARNER,
           "Probability that the student puts on the support: what is missing is not trained by a "
           "renormalized or raw measure."),
    Metric("train/support_teacher_mass", "fraction", _MEAN, _LEARNER,
           "Probability that the teacher puts on the support."),
    Metric("train/support_overlap_frac", "fraction", _MEAN, _LEARNER,
           "Share of the teacher's top-K that is also among the student's."),
    *(Metric(f"train/log_ratio_at/{bucket}", "nats", _MEAN, _LEARNER,
             f"Mean log pi - log q of the tokens at response positions {bucket}.")
      for bucket in POSITION_BUCKETS),
    Metric("task/reward_mean", "1", _MEAN, _LEARNER,
           "Mean reward of the responses of the step (task.coefficient > 0 only)."),
    Metric("teacher/entropy_topk", "nats", _MEAN, _LEARNER,
           "Entropy of the teacher's next-token distribution, known at the K tokens that it sent, all others "
           "as one: a lower bound, off by at most rest * log(V - K), with rest = 1 - the teacher's mass "
           "on the K; absent where served teachers are asked for the sampled tokens alone."),
    Metric("teacher/entropy", "nats", _MEAN, _LEARNER,
           "Entropy of the next-token distribution of teachers inside the learner, exact."),
    # How far the data is from the policy that is trained.
    Metric("offpolicy/age_mean", "versions", _MEAN, _CONTROLLER,
           "Weight versions between the policy that wrote a sample and the one being trained; 0 "
           "is strictly on-policy."),
    Metric("offpolicy/age_max", "versions", _MAX, _CONTROLLER,
           "The oldest sample of the step, in weight versions."),
    Metric("offpolicy/token_age_mean", "versions", _MEAN, _CONTROLLER,
           "The same age, of each token by the version that wrote it; a sample counts as old as its "
           "oldest token."),
    Metric("offpolicy/mixed_frac", "fraction", _MEAN, _CONTROLLER,
           "Share of samples that more than one version wrote, because the weights changed while they "
           "were under way (overlap.mode=async)."),
    Metric("offpolicy/logprob_diff_mean", "nats", _MEAN, _LEARNER,
           "Mean |log-prob by the learner - log-prob by the rollout server| of the sampled "
           "tokens."),
    Metric("offpolicy/logprob_diff_max", "nats", _MAX, _LEARNER,
           "Largest such difference; a jump means that the two engines do not hold the same "
           "weights."),
    Metric("offpolicy/masked_frac", "fraction", _MEAN, _LEARNER,
           "Share of response tokens whose importance ratio left the trusted interval, so that "
           "they do not train."),
    Metric("offpolicy/kept_mass", "probability", _MEAN, _LEARNER,
           "Probability that top-p, top-k and min-p of the rollout kept at a position; the sampled-token term is "
           "multiplied by it (truncated rollouts only)."),
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
    Metric("rollout/repetitive_frac", "fraction", _MEAN, _CONTROLLER,
           "Share of responses that end in one block of at most 32 tokens, eight times or more in a row."),
    Metric("rollout/turns_mean", "turns", _MEAN, _ROLLOUT,
           "Mean number of the student's turns in a conversation (environment.name only)."),
    Metric("rollout/environment_reward_mean", "1", _MEAN, _ROLLOUT,
           "Mean reward that the environment gave (environment.name only); it trains nothing unless "
           "task.coefficient is above 0."),
    Metric("rollout/tokens_per_s", "tokens/s", _MEAN, _ROLLOUT,
           "Response tokens of the step per second in which a rollout was under way, all servers "
           "together."),
    # What the teachers answer.
    Metric("teacher/latency_p95_s", "s", _MAX, _TEACHER,
           "95th percentile of the time from request to scores, one request per sequence; absent "
           "without a served teacher."),
    Metric("teacher/tokens_per_s", "tokens/s", _MEAN, _TEACHER,
           "Prompt and response tokens scored per second of perf/teacher_s."),
    Metric("teacher/share/<teacher>", "fraction", _MEAN, _CONTROLLER,
           "Share of the response tokens of the step that learned from this teacher; in a mean it counts "
           "with its weight."),
    Metric("teacher/left_out_mass", "fraction", _MEAN, _TEACHER,
           "Upper bound on the target's probability of tokens that a support should have and a served "
           "teacher did not score (objective.support_route=larger_topk); 0 on an exact route."),
    Metric("teacher/error_nats_max", "nats", _MAX, _TEACHER,
           "Largest error that a log-prob of a mean of served teachers can have: the normaliser of a "
           "geometric mean is known within bounds."),
    Metric("teacher/error_frac", "fraction", _MEAN, _TEACHER,
           "Share of scoring requests that failed and were sent again."),
    # Where the time goes. The stages add up to perf/step_s. With overlap.mode other than sync the learner's come first.
    Metric("perf/step_s", "s", _SUM, _CONTROLLER,
           "Wall time of the step, from the first request (overlap.mode other than sync: from the end of "
           "the step before) until the servers hold the new weights; evaluation is not part of it."),
    Metric("perf/rollout_s", "s", _SUM, _CONTROLLER,
           "Time until the last response was there; with overlap.mode other than sync, what the "
           "learner waited for responses alone."),
    Metric("perf/teacher_s", "s", _SUM, _CONTROLLER,
           "Time from the last response until the last teacher score was there (overlap.mode other "
           "than sync: what the learner waited for scores); a teacher inside the learner scores within "
           "the step, which counts here."),
    Metric("perf/learner_s", "s", _SUM, _LEARNER,
           "Forward, backward and optimizer, as measured by the learner."),
    Metric("perf/publish_s", "s", _SUM, _CONTROLLER,
           "Making the new weights ready: probes; with `weight_sync.route=disk` also a Hugging Face directory."),
    Metric("perf/sync_s", "s", _SUM, _CONTROLLER,
           "Bringing the new weights to the rollout servers, and the proof that they hold them."),
    Metric("perf/checkpoint_s", "s", _SUM, _CONTROLLER,
           "What a checkpoint keeps training waiting; all of writing it unless `checkpoint.async_save`."),
    Metric("perf/commit_s", "s", _MAX, _CONTROLLER,
           "From the beginning of the newest finished checkpoint until a resume may start from it; with "
           "`checkpoint.async_save` most of it passes beside the training; compare `cluster.grace_s`."),
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
           "KL(student || teacher) at the tokens of held-out rollouts: exact, over the whole "
           "vocabulary, up to 1024 entries or with a teacher inside the learner; else the mean of "
           "log pi - log q of tokens that were sampled at temperature 1 without truncation."),
    Metric("eval/heldout/kl_forward", "nats/token", _MEAN, _EVAL,
           "KL(teacher || student) at the same tokens, exact; absent for vocabularies above 1024 "
           "entries with a served teacher."),
    Metric("eval/heldout/teacher_accuracy", "fraction", _LAST, _EVAL,
           "The teacher's own accuracy on the same problems with the same settings: the line to "
           "reach; absent for a teacher inside the learner, which writes nothing."),
    Metric("eval/heldout/accuracy_of/<teacher>", "fraction", _LAST, _EVAL,
           "A teacher's own accuracy, of each where there are several."),
    Metric("eval/heldout/accuracy_as/<teacher>", "fraction", _MEAN, _EVAL,
           "The student's accuracy under the control text of a teacher (teaching.kind=control_token only)."),
    Metric("eval/heldout/kl_reverse_to/<teacher>", "nats/token", _MEAN, _EVAL,
           "KL(student || teacher) as eval/heldout/kl_reverse, to each teacher where there are several."),
    Metric("eval/heldout/kl_forward_to/<teacher>", "nats/token", _MEAN, _EVAL,
           "KL(teacher || student) as eval/heldout/kl_forward, to each teacher where there are several."),
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
    # The servers. All since the start of the attempt.
    Metric("servers/out", "servers", _LAST, _CONTROLLER,
           "Servers out of service now: dead, hanging, or not yet updated and verified since."),
    Metric("servers/left", "servers", _LAST, _CONTROLLER,
           "Times that a server was taken out of service since the start of the attempt."),
    Metric("servers/returned", "servers", _LAST, _CONTROLLER,
           "Times that one came back, updated and verified."),
    Metric("servers/failed_requests", "requests", _LAST, _CONTROLLER,
           "Requests that a server failed or answered in a way that can not be used; each was sent "
           "to a server again."),
    # Resources.
    Metric("memory/peak_rss_gib", "GiB", _MAX, _CONTROLLER,
           "Resident memory of all processes of the run together, the highest seen so far."),
)
# fmt: on

METRICS_BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}
PER_TEACHER = "<teacher>"


def find_metric(name: str) -> Metric | None:
    """The row of a recorded name; a row that ends with <teacher> is of that series for each teacher."""
    family = f"{name.rpartition('/')[0]}/{PER_TEACHER}"
    return METRICS_BY_NAME.get(name) or METRICS_BY_NAME.get(family)
