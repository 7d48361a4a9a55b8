"""The bound on the age of tokens, where it counts: in the process that trains them."""

from __future__ import annotations

import numpy as np

from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import BatchIndex


def check_staleness(index: BatchIndex, version: int, max_staleness: int) -> None:
    """Refuse a batch with tokens that are too old, or newer than possible, whatever the scheduler thought.

    Args:
        version: of the learner's weights, the number of applied steps.
        max_staleness: of the recipe.

    Raises:
        ContractError: naming the first such token.
    """
    if index.weight_version != version:
        raise ContractError(
            f"step {index.step}: the batch is for weight version {index.weight_version}, the learner holds {version}"
        )
    ages = version - index.token_versions
    written = index.token_versions >= 0
    bad = np.flatnonzero(written & ((ages > max_staleness) | (ages < 0)))
    if len(bad):
        token = int(bad[0])
        sample = int(np.searchsorted(index.response_offsets, token, side="right")) - 1
        raise ContractError(
            f"sample {index.sample_ids[sample]}, response token {token - int(index.response_offsets[sample])}: made by "
            f"weight version {index.token_versions[token]}, the learner trains version {version} with max_staleness "
            f"{max_staleness} ({len(bad)} tokens like it)"
        )
