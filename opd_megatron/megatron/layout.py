"""Sizes of the parallel dimensions, and what a micro-batch must be a multiple of because of them. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from opd_megatron.config.schema import LearnerConfig, Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.megatron.precision import token_alignment

# A document is cut into 2 * cp pieces, the zig-zag split that balances causal attention.
_ZIGZAG_PIECES = 2


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions."""

    tp: int
    pp: int
    cp: int
    dp: int
    vpp: int = 1  # model chunks per pipeline stage
    alignment: int = 1  # of the tokens of a rank, for FP8 kernels

    @property
    def document_multiple(self) -> int:
        """Every packed document is padded to a multiple of this."""
        return _ZIGZAG_PIECES * self.cp if self.cp > 1 else 1

    @property
    def token_multiple(self) -> int:
        """Every micro-batch, and every row of a padded one, is a multiple of this: SP and CP shards are even and
        aligned."""
        return math.lcm(self.document_multiple, self.cp * self.tp * self.alignment)

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule takes micro-batches in groups of this many."""
        return self.pp if self.vpp > 1 else 1

    def as_mapping(self) -> dict[str, int]:
        """How weights lie on ranks."""
        return {key: value for key, value in asdict(self).items() if key != "alignment"}


def layout_of(learner: LearnerConfig) -> Layout:
    """The layout a recipe asks for.

    Raises:
        ConfigError: sequence parallel without tensor parallel.
    """
    if learner.sequence_parallel and learner.tensor_parallel == 1:
        raise ConfigError.of(
            "learner.sequence_parallel",
            True,
            "needs learner.tensor_parallel > 1",
            "set it to false or raise learner.tensor_parallel",
        )
    return Layout(
        tp=learner.tensor_parallel,
        pp=learner.pipeline_parallel,
        cp=learner.context_parallel,
        dp=learner.data_parallel,
        vpp=learner.virtual_pipeline,
        alignment=token_alignment(learner),
    )


def check_micro_batch(recipe: Recipe) -> None:
    """The longest possible sample must fit into a micro-batch as this layout cuts it.

    Raises:
        ConfigError: it does not, so a step would fail as soon as one came.
    """
    multiple = layout_of(recipe.learner).token_multiple
    longest = recipe.data.max_prompt_tokens + recipe.max_response_tokens
    needed = -(-(longest - 1) // multiple) * multiple
    if needed > recipe.batch.tokens_per_microbatch:
        raise ConfigError.of(
            "batch.tokens_per_microbatch",
            recipe.batch.tokens_per_microbatch,
            f"the longest possible sample has {longest} tokens, and this layout and precision take "
            f"micro-batches in multiples of {multiple}",
            f"raise it to at least {needed}",
        )
