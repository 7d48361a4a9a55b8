"""The plan of a step batch: everything of the loss that needs to see more than one micro-batch.

Made once a step from the arrays of the WHOLE batch, the same on every rank, so no split over
micro-batches, data- or context-parallel ranks can change it: which tokens train (special tokens,
the filter), importance weights and advantages that couple tokens, the task term, whitening, and
what each token's loss is scaled with. The result is cut into micro-batches like any recorded array.

Order, where several apply: mask -> filter (percentiles over what the mask left) -> ratios of whole
responses over all their tokens, costs over the kept ones -> distillation advantage -> whitening ->
sum with the task's -> normalization over the kept tokens.

Shape suffixes: N response tokens of the batch in batch order, B responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_megatron.errors import ContractError
from opd_megatron.losses.corrections import bounded_weights, sequence_log_ratios
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.estimators import ESTIMATORS, value_as_advantage
from opd_megatron.losses.filters import gather_scores, percentile_window
from opd_megatron.losses.normalization import token_weights
from opd_megatron.losses.returns import discounted_advantages
from opd_megatron.losses.sequences import Sequences
from opd_megatron.losses.settings import LossSettings
from opd_megatron.losses.token_loss import log_ratios
from opd_megatron.losses.truncation import kept_mass
from opd_megatron.losses.whitening import Moments, whiten


@dataclass(frozen=True)
class BatchArrays:
    """What is recorded about a whole step batch.

    behavior_logprobs_N, teacher_logprobs_N: [N] float32, of the sampled tokens.
    trainable_N: [N] bool, False for tokens that are masked for what they are (special tokens, an environment's).
    sampled_N: [N] bool, False for tokens that no policy drew (an environment's); None: all were drawn.
    response_ids_N: [N] int64, the response of every token; tokens of a response are adjacent.
    groups_B: [B] int64, the prompt of every response.
    rewards_B: [B] float32, or None without a task.
    teacher_entropy_N: [N] float32, or None where it is not known.
    teacher_entropy_exact: it is of the whole vocabulary, not a bound from a top-K.
    kept_logmass_N: [N] float32, log of the mass that truncated sampling kept; None: all of it.
    """

    behavior_logprobs_N: torch.Tensor
    teacher_logprobs_N: torch.Tensor
    trainable_N: torch.Tensor
    response_ids_N: torch.Tensor
    groups_B: torch.Tensor
    rewards_B: torch.Tensor | None = None
    teacher_entropy_N: torch.Tensor | None = None
    teacher_entropy_exact: bool = False
    kept_logmass_N: torch.Tensor | None = None
    sampled_N: torch.Tensor | None = None

    @property
    def num_responses(self) -> int:
        return len(self.groups_B)


@dataclass(frozen=True)
class StudentScores:
    """The student's log-probs and entropies at the start of the step, [N] float32 each."""

    logprobs_N: torch.Tensor
    entropy_N: torch.Tensor


@dataclass(frozen=True)
class TokenPlan:
    """[N] each. None where the micro-batch computes it alone.

    mask_N: bool, what trains. scale_N: float32, mean 1 over the kept tokens, so that the loss sum is
    divided by their number for every normalization. task_N: credit to be added to the
    micro-batch's own. advantages_N: total credit of the sampled token, instead of it.
    old_logprobs_N: of the policy that PPO clips against. kept_mass_N: what truncated sampling kept.
    metrics: of the plan, ready to log.
    """

    mask_N: torch.Tensor
    scale_N: torch.Tensor
    task_N: torch.Tensor | None
    advantages_N: torch.Tensor | None
    weights_N: torch.Tensor | None
    outside_N: torch.Tensor | None
    old_logprobs_N: torch.Tensor | None
    kept_mass_N: torch.Tensor | None
    metrics: dict[str, float]

    @property
    def num_kept(self) -> int:
        return int(self.mask_N.sum())


def make_plan(
    settings: LossSettings, arrays: BatchArrays, scores: StudentScores | None = None
) -> TokenPlan:
    """Plan a batch.

    Args:
        settings: checked by `check_settings`.
        arrays: on the CPU.
        scores: given exactly when `settings.needs_scores`.

    Returns:
        TokenPlan; a batch without kept tokens has an all-False mask and is an ordinary result.

    Raises:
        ContractError: something that the settings need is not in the batch.
    """
    if settings.needs_scores and scores is None:
        raise ContractError("this objective plans a batch from the student's log-probs; none given")
    mask_N, metrics = _mask(settings, arrays, scores)
    kept = Sequences(
        torch.where(mask_N, arrays.response_ids_N, -torch.ones_like(arrays.response_ids_N)),
        arrays.num_responses,
    )
    task_N = advantages_N = weights_N = outside_N = None
    if settings.task.coefficient > 0.0:
        task_N = _task(settings, arrays, kept, metrics)
    if scores is not None:
        weights_N, outside_N = _weights(settings, arrays, scores)
        advantages_N = _credit(settings, arrays, scores, kept, task_N, metrics)
        task_N = None
    per_token_N, divisor = token_weights(kept, settings.objective.normalization)
    # token_loss divides by the number of kept tokens; divided here is what that leaves over.
    scale_N = per_token_N * (mask_N.sum() / divisor.clamp_min(1.0))
    return TokenPlan(
        mask_N=mask_N,
        scale_N=scale_N.float(),
        task_N=task_N,
        advantages_N=advantages_N,
        weights_N=weights_N,
        outside_N=outside_N,
        old_logprobs_N=scores.logprobs_N if scores and settings.updates_per_step > 1 else None,
        kept_mass_N=_kept_mass(arrays, mask_N, metrics),
        metrics=metrics,
    )


def _kept_mass(
    arrays: BatchArrays, mask_N: torch.Tensor, metrics: dict[str, float]
) -> torch.Tensor | None:
    if arrays.kept_logmass_N is None:
        return None
    mass_N = kept_mass(arrays.kept_logmass_N)
    metrics["offpolicy/kept_mass"] = float(mass_N[mask_N].mean()) if bool(mask_N.any()) else 0.0
    return mass_N


def _mask(
    settings: LossSettings, arrays: BatchArrays, scores: StudentScores | None
) -> tuple[torch.Tensor, dict[str, float]]:
    trainable_N = arrays.trainable_N.bool()
    total = len(trainable_N)
    if arrays.sampled_N is not None:
        trainable_N = trainable_N & arrays.sampled_N
        total = int(arrays.sampled_N.sum())
    metrics = {"train/special_masked_frac": 1.0 - int(trainable_N.sum()) / max(1, total)}
    config = settings.filter
    if config.score == "none":
        return trainable_N, metrics
    scores_N = _filter_scores(config.score, arrays, scores)
    everyone = gather_scores(scores_N, trainable_N, None)
    mask_N = percentile_window(scores_N, trainable_N, everyone, config.low, config.high)
    metrics["train/filter_kept_frac"] = int(mask_N.sum()) / max(1, int(trainable_N.sum()))
    return mask_N, metrics


def _filter_scores(name: str, arrays: BatchArrays, scores: StudentScores | None) -> torch.Tensor:
    if name == "teacher_entropy":
        if arrays.teacher_entropy_N is None:
            raise ContractError("filter.score=teacher_entropy: the batch carries no teacher top-K")
        return arrays.teacher_entropy_N
    assert scores is not None
    if name == "student_entropy":
        return scores.entropy_N
    return log_ratios(scores.logprobs_N, arrays.teacher_logprobs_N)


def _weights(
    settings: LossSettings, arrays: BatchArrays, scores: StudentScores
) -> tuple[torch.Tensor, torch.Tensor]:
    log_ratio_N = scores.logprobs_N - arrays.behavior_logprobs_N
    level = settings.correction.level
    if level != "token":
        # Over every token that the policy drew, trained on or not: the response was drawn with all of them.
        drawn_N = arrays.response_ids_N
        if arrays.sampled_N is not None:
            drawn_N = torch.where(arrays.sampled_N, drawn_N, -torch.ones_like(drawn_N))
        responses = Sequences(drawn_N, arrays.num_responses)
        log_ratio_N = sequence_log_ratios(
            log_ratio_N.double(), responses, per_token=level == "geometric_mean"
        ).to(log_ratio_N.dtype)
    return bounded_weights(log_ratio_N, settings.correction)


def _distillation(
    settings: LossSettings, arrays: BatchArrays, scores: StudentScores, kept: Sequences
) -> torch.Tensor:
    """Advantages of the distillation term, without its coefficient; 0 for support estimators."""
    if settings.has_support:
        return torch.zeros_like(scores.logprobs_N)
    objective = settings.objective
    divergence = make_divergence(objective)
    log_r = log_ratios(scores.logprobs_N, arrays.teacher_logprobs_N)
    log_r = torch.where(kept.kept_T, log_r, torch.zeros_like(log_r))
    advantages_N = ESTIMATORS.get(objective.estimator)(divergence)(log_r)
    if objective.discount > 0.0:
        costs_N = -value_as_advantage(divergence)(log_r.double())
        advantages_N = discounted_advantages(
            advantages_N.double(), costs_N, kept, objective.discount
        ).to(log_r.dtype)
    return torch.where(kept.kept_T, advantages_N, torch.zeros_like(advantages_N))


def _sets(scope: str, arrays: BatchArrays, kept: Sequences) -> Sequences:
    """The kept tokens, numbered by the set that they are whitened in."""
    if scope == "sample":
        return kept
    if scope == "batch":
        return Sequences(torch.where(kept.kept_T, 0, -1), 1)
    groups_N = arrays.groups_B[kept.ids_T.clamp_min(0)]
    return Sequences(
        torch.where(kept.kept_T, groups_N, -torch.ones_like(groups_N)),
        int(arrays.groups_B.max()) + 1 if len(arrays.groups_B) else 0,
    )


def _task(
    settings: LossSettings, arrays: BatchArrays, kept: Sequences, metrics: dict[str, float]
) -> torch.Tensor:
    """The task term at every token, coefficient included.

    Whitened among responses, not tokens: a long response is one draw of the reward like a short
    one. Whitening within a group is GRPO's advantage, 2402.03300.
    """
    rewards_B = arrays.rewards_B
    if rewards_B is None:
        raise ContractError(
            f"task.coefficient={settings.task.coefficient}: the batch carries no rewards"
        )
    metrics["task/reward_mean"] = float(rewards_B.mean()) if len(rewards_B) else 0.0
    advantages_B = rewards_B.double()
    if settings.whitening.of == "task" and settings.whitening.scope != "none":
        groups_B = arrays.groups_B
        if settings.whitening.scope == "batch":
            groups_B = torch.zeros_like(groups_B)
        sets = Sequences(groups_B, int(groups_B.max()) + 1 if len(groups_B) else 0)
        advantages_B, before = whiten(advantages_B, sets)
        _log_moments(before, sets, metrics)
    return settings.task.coefficient * kept.spread(advantages_B).to(rewards_B.dtype)


def _credit(
    settings: LossSettings,
    arrays: BatchArrays,
    scores: StudentScores,
    kept: Sequences,
    task_N: torch.Tensor | None,
    metrics: dict[str, float],
) -> torch.Tensor:
    """Total credit of every token."""
    whitening = settings.whitening
    total_N = _distillation(settings, arrays, scores, kept)
    if whitening.scope != "none" and whitening.of == "distillation":
        total_N = _whitened(settings, arrays, total_N, kept, metrics)
    total_N = settings.objective.coefficient * total_N
    if task_N is not None:
        total_N = total_N + task_N
    if whitening.scope != "none" and whitening.of == "sum":
        total_N = _whitened(settings, arrays, total_N, kept, metrics)
    return total_N


def _whitened(
    settings: LossSettings,
    arrays: BatchArrays,
    values_N: torch.Tensor,
    kept: Sequences,
    metrics: dict[str, float],
) -> torch.Tensor:
    sets = _sets(settings.whitening.scope, arrays, kept)
    whitened_N, before = whiten(values_N.double(), sets)
    _log_moments(before, sets, metrics)
    return whitened_N.to(values_N.dtype)


def _log_moments(before: Moments, sets: Sequences, metrics: dict[str, float]) -> None:
    """Mean over the sets of their mean and standard deviation before whitening."""
    filled_B = sets.lengths(torch.float64) > 0
    num_sets = max(1, int(filled_B.sum()))
    metrics["train/whitening_mean"] = float(before.mean_B[filled_B].sum()) / num_sets
    metrics["train/whitening_std"] = float(before.std_B[filled_B].sum()) / num_sets
