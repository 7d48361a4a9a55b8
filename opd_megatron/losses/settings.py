"""The sections of a recipe that decide the loss, together. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_megatron.config.schema import (
    SUPERVISED_ESTIMATOR,
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    Recipe,
    TaskConfig,
    WhiteningConfig,
)

SUPPORT_ESTIMATORS = ("support_matching", "topk_surrogate")
# Supports whose ids are all among what a served teacher sends: its own top-K and the sampled token.
SERVED_SUPPORTS = ("teacher_topk", "teacher_topk_plus_sampled", "intersection")
# Supports that a served teacher is asked for by the student's own choice (`teacher/routes.py`).
LISTED_SUPPORTS = ("student_topk", "union", "symmetric_difference")
# Supports that need the student's K most likely tokens.
STUDENT_SUPPORTS = ("student_topk", "union", "intersection", "symmetric_difference")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the loss is. The defaults are the recipe's: sampled-token reverse KL with IcePop."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    updates_per_step: int = 1
    # A served teacher's batch lists the tokens of a support that the student chose as it sampled.
    served_lists: bool = False
    # No teacher is inside the learner.
    only_served: bool = False
    # Rollouts were drawn with top-p, top-k or min-p; see truncation.py.
    truncated: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> LossSettings:
        return cls(
            objective=recipe.objective,
            task=recipe.task,
            whitening=recipe.whitening,
            filter=recipe.filter,
            correction=recipe.correction,
            updates_per_step=recipe.batch.updates_per_step,
            served_lists=bool(recipe.served_teachers)
            and recipe.objective.estimator in SUPPORT_ESTIMATORS
            and recipe.objective.support in LISTED_SUPPORTS,
            only_served=not recipe.in_process_teachers,
            truncated=recipe.rollout.truncates and not recipe.is_supervised,
        )

    @property
    def has_support(self) -> bool:
        """The loss looks at a set of tokens at every position."""
        return self.objective.estimator in SUPPORT_ESTIMATORS

    @property
    def is_supervised(self) -> bool:
        """The responses are the data's: there is neither a teacher nor a behavior policy."""
        return self.objective.estimator == SUPERVISED_ESTIMATOR

    @property
    def has_full_support(self) -> bool:
        """The loss looks at the whole vocabulary, which no list of ids describes."""
        return self.has_support and self.objective.support == "full"

    @property
    def teacher_topk(self) -> int:
        """K that a served teacher must send; 0 when only the sampled token is needed."""
        needs = self.has_support or self.filter.score == "teacher_entropy"
        return self.objective.topk if needs else 0

    @property
    def student_topk(self) -> int:
        """K of the student that the learner must find; 0 when it need not."""
        if self.served_lists and self.only_served:
            return 0  # rollouts brought it along
        uses = self.objective.support in STUDENT_SUPPORTS or self.objective.report_overlap
        needs = self.has_support and uses
        return self.objective.topk if needs else 0

    @property
    def reports_overlap(self) -> bool:
        """Whether the teacher's own top-K is there to be compared with the student's, for every sample."""
        return self.student_topk > 0 and not self.served_lists

    @property
    def needs_scores(self) -> bool:
        """The plan of a batch needs the student's log-probs of all of it before the first backward.

        So it is for everything that couples tokens (filters, whitening, a discount, ratios of whole
        responses) and for a second update, which is clipped against the first one's policy.
        """
        return (
            self.filter.score in ("kl", "student_entropy")
            or self.objective.discount > 0.0
            or (self.whitening.scope != "none" and self.whitening.of != "task")
            or (self.correction.kind != "none" and self.correction.level != "token")
            or self.updates_per_step > 1
        )
