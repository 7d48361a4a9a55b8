"""What a server says of truncated sampling is read exactly or refused."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import ContractError
from opd_megatron.serving.kept_mass import parse_kept

IDS = (5, 9, 2)
LOGPROBS = np.log(np.asarray([0.5, 0.2, 0.7], np.float32))
TOP_K = 3
META: dict[str, Any] = {
    "output_token_sampling_mask": [[5, 1], [9, 5, 2], [2]],
    "output_token_sampling_logprobs": [math.log(0.5 / 0.8), math.log(0.2 / 0.9), 0.0],
    "output_token_sampling_mask_length": 3,
}


def parse(meta: dict[str, Any]) -> Any:
    return parse_kept(meta, IDS, LOGPROBS, 10, TOP_K)


def test_the_kept_mass_follows_from_the_two_logprobs() -> None:
    assert np.allclose(np.exp(parse(META)), [0.8, 0.9, 0.7], atol=1e-6)


def test_rounding_never_keeps_more_than_everything() -> None:
    meta = META | {"output_token_sampling_logprobs": [*LOGPROBS[:2].astype(float) - 1e-5, 0.0]}
    assert (parse(meta) <= 0).all()


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        ({"output_token_sampling_mask_length": 2}, "must be 3"),
        ({"output_token_sampling_mask": None}, "list of 3"),
        ({"output_token_sampling_mask": [[5], [9]]}, "list of 3"),
        ({"output_token_sampling_mask": [[1], [9], [2]]}, "sampled token 5"),
        ({"output_token_sampling_mask": [[5, 1], [], [2]]}, "1 to 3 ids"),
        ({"output_token_sampling_mask": [[5, 1, 2, 3], [9], [2]]}, "1 to 3 ids"),
        ({"output_token_sampling_mask": [[5, 5], [9], [2]]}, "unique"),
        ({"output_token_sampling_mask": [[5, 10], [9], [2]]}, "token id"),
        ({"output_token_sampling_mask": [[5, "1"], [9], [2]]}, "token id"),
        ({"output_token_sampling_logprobs": [-0.4, -1.4]}, "list of 3"),
        ({"output_token_sampling_logprobs": [math.nan, -1.4, 0.0]}, "finite"),
        ({"output_token_sampling_logprobs": [0.1, -1.4, 0.0]}, "not positive"),
        ({"output_token_sampling_logprobs": [-0.9, -1.4, 0.0]}, "only raise"),
        ({"output_token_sampling_logprobs": [-0.4, -1.4, -0.1]}, "is certain"),
    ],
)
def test_what_can_not_be_is_refused(spoil: dict[str, Any], rule: str) -> None:
    with pytest.raises(ContractError, match=rule):
        parse(META | spoil)


def is_right(meta: dict[str, Any]) -> bool:
    """A second reading of the rules, by other means."""

    def is_support(value: Any, token: int) -> bool:
        return (
            type(value) is list
            and all(type(entry) is int and entry in range(10) for entry in value)
            and token in value
            and len(value) == len({*value}) <= TOP_K
        )

    def is_logprob(value: Any, least: float, support: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value) or value > 1e-6:
            return False
        return value >= (-1e-3 if len(support) == 1 else least - 1e-3)

    masks, values = (meta[f"output_token_sampling_{name}"] for name in ("mask", "logprobs"))
    if type(masks) is not list or type(values) is not list:
        return False
    length = meta["output_token_sampling_mask_length"]
    return (
        type(length) is int
        and length == len(masks) == len(values) == 3
        and all(is_support(*pair) for pair in zip(masks, IDS, strict=True))
        and all(is_logprob(*row) for row in zip(values, LOGPROBS.tolist(), masks, strict=True))
    )


def test_ten_thousand_mutations_are_refused_exactly_where_a_rule_is_broken() -> None:
    rng = random.Random(7)
    seen: Counter[bool] = Counter()
    junk = (None, True, "7", [], {}, -1, 0, 2, 10, 3.5, math.inf, -math.inf, math.nan, -0.25, 1e-7)
    assert is_right(META)
    for _ in range(10_000):
        meta = copy.deepcopy(META)
        key = rng.choice(list(meta))
        if key.endswith("length") or rng.random() < 0.2:
            meta[key] = rng.choice(junk)
        else:
            row = rng.randrange(3)
            target = meta[key][row]
            if isinstance(target, list) and rng.random() < 0.7:
                target[rng.randrange(len(target))] = rng.choice(junk)
            else:
                meta[key][row] = rng.choice(junk)
        try:
            kept = parse(meta)
        except ContractError:
            accepted = False
        else:
            accepted = True
            assert np.isfinite(kept).all() and (kept <= 0).all()
        assert accepted is is_right(meta), meta
        seen[accepted] += 1
    assert seen[True] > 100 and seen[False] > 5000
