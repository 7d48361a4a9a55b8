"""What a loss sum is divided by. Every choice is one weight a token and one global divisor.

    token_mean      every token counts the same: weight 1, divisor = number of tokens of the batch
    sequence_mean   every response counts the same: weight 1 / its length, divisor = responses

The divisor is summed over all micro-batches and ranks before it divides, so the loss of a batch
does not depend on how it was cut. A mean of micro-batch means would.
"""

from __future__ import annotations

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.sequences import Sequences

NORMALIZATIONS = ("token_mean", "sequence_mean")


def token_weights(sequences: Sequences, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of every token and this micro-batch's part of the divisor.

    Args:
        sequences: the kept tokens of whole responses; a response without any counts nowhere.
        name: `token_mean` or `sequence_mean`.

    Returns:
        [T] float32 weights, 0 at tokens without a sequence, and a scalar to be summed globally.

    Raises:
        ConfigError: unknown name.
    """
    if name not in NORMALIZATIONS:
        raise ConfigError.of(
            "normalization", name, "unknown", f"use one of: {', '.join(NORMALIZATIONS)}"
        )
    if name == "token_mean":
        kept = sequences.kept_T.float()
        return kept, kept.sum()
    lengths_B = sequences.lengths(torch.float32)
    inverse_B = torch.where(lengths_B > 0, 1.0 / lengths_B.clamp_min(1), 0.0)
    return sequences.spread(inverse_B), (lengths_B > 0).sum().float()
