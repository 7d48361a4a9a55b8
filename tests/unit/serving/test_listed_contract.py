"""Listed tokens and the student's own top-K: what is read, and that everything else is refused."""

from __future__ import annotations

import base64
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opd_megatron.errors import ContractError
from opd_megatron.serving.contract import parse_generation, read_scores
from opd_megatron.serving.requests import score_body

VOCAB, LISTED = 9, (3, 0, 8)
PROMPT, RESPONSE = (1, 2), (5, 6)


def scored() -> dict[str, Any]:
    rows = [[[-1.0, 3, None], [-2.0, 0, None], [-3.0, 8, None]] for _ in RESPONSE]
    return {
        "output_ids": [],
        "meta_info": {
            "id": "r",
            "prompt_tokens": 4,
            "completion_tokens": 0,
            "finish_reason": {"type": "length", "length": 0},
            "weight_version": "7",
            "input_token_logprobs": [[None, 2, None], [-0.5, 5, None], [-0.6, 6, None]],
            "input_token_ids_logprobs": [None, *rows],
        },
    }


def read(item: dict[str, Any]) -> Any:
    (score,) = read_scores(
        [item],
        sent_as=["r"],
        sequences=[(PROMPT, RESPONSE)],
        vocab_size=VOCAB,
        topk=0,
        listed=[LISTED],
    )
    return score


def test_listed_log_probs_come_back_in_the_order_they_were_asked_for() -> None:
    score = read(scored())
    assert score.listed_logprobs.tolist() == [[-1.0, -2.0, -3.0]] * 2
    assert score.logprobs.tolist() == pytest.approx([-0.5, -0.6])
    assert score.topk_ids is None and score.weight_version == 7


def _put(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(item: dict[str, Any]) -> None:
        place: Any = item["meta_info"]["input_token_ids_logprobs"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _put((1, 0, 1), 4),  # another token
        _put((1, 0, 1), True),
        _put((1, 0), [-1.0, 0, None]),  # shifted by one
        _put((1, 0, 0), None),
        _put((1, 0, 0), math.nan),
        _put((1, 0, 0), -math.inf),
        _put((1, 0, 0), 0.1),
        _put((1, 0, 0), -0.1),  # with the others more than 1
        _put((1,), [[-1.0, 3, None]]),  # a shorter row
        _put((1,), None),
        _put((0,), []),
        lambda item: item["meta_info"].pop("input_token_ids_logprobs"),
        lambda item: item["meta_info"]["input_token_ids_logprobs"].pop(),
        lambda item: item["meta_info"]["input_token_ids_logprobs"].append(
            item["meta_info"]["input_token_ids_logprobs"][1]
        ),
    ],
)
def test_what_was_not_asked_for_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    item = copy.deepcopy(scored())
    change(item)
    with pytest.raises(ContractError):
        read(item)


def generated(form: str, ids: Any = ((5, 1), (6, 0))) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": "r",
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "finish_reason": {"type": "length", "length": 2},
        "weight_versions": [{"version": "7", "start": 0, "end": 2}],
        "output_token_logprobs": [[-0.5, 5, None], [-2.0, 6, None]],
    }
    values = [[-0.5, -1.5], [-2.0, -2.5]]
    if form == "nested":
        rows = zip(values, ids, strict=True)
        meta["output_top_logprobs"] = [
            [[v, i, None] for v, i in zip(*row, strict=True)] for row in rows
        ]
    else:
        for part, array in (
            ("val", np.asarray(values, np.float32)),
            ("idx", np.asarray(ids, np.int32)),
        ):
            key = f"output_top_logprobs_{part}_flat_b64"
            meta[key] = base64.b64encode(array.tobytes()).decode()
            meta[f"{key}_dtype"] = "float32" if part == "val" else "int32"
        meta |= {"output_top_logprobs_shape": [2, 2], "output_top_logprobs_null_prefix": 0}
    return {"output_ids": [5, 6], "meta_info": meta}


def parsed(item: dict[str, Any]) -> Any:
    return parse_generation(
        item,
        rid="r",
        sent_as="r",
        prompt_length=2,
        vocab_size=VOCAB,
        max_new_tokens=2,
        server="s",
        topk=2,
    )


@pytest.mark.parametrize("form", ["base64", "nested"])
def test_the_student_s_top_k_comes_with_the_rollout_in_either_form(form: str) -> None:
    assert parsed(generated(form)).topk_ids.tolist() == [[5, 1], [6, 0]]


@pytest.mark.parametrize("form", ["base64", "nested"])
@pytest.mark.parametrize("ids", [((5, 5), (6, 0)), ((5, 9), (6, 0)), ((1, 5), (6, 0))])
def test_a_top_k_that_contradicts_the_sampled_tokens_is_refused(form: str, ids: Any) -> None:
    with pytest.raises(ContractError):
        parsed(generated(form, ids))


def test_a_top_k_with_the_leading_row_of_a_prompt_is_refused() -> None:
    item = generated("base64")
    item["meta_info"]["output_top_logprobs_null_prefix"] = 1
    with pytest.raises(ContractError, match="null_prefix"):
        parsed(item)


def test_the_compact_form_is_asked_for_with_a_top_k_alone() -> None:
    body = score_body([(PROMPT, RESPONSE)], ["r"], 0, [LISTED])
    assert body["token_ids_logprob"] == [list(LISTED)] and body["logprob_start_len"] == [1]
    assert not body["return_flat_raw_top_logprobs_b64"]
    assert score_body([(PROMPT, RESPONSE)], ["r"], 4)["return_flat_raw_top_logprobs_b64"]
    assert "token_ids_logprob" not in score_body([(PROMPT, RESPONSE)], ["r"], 4)
    nested = score_body([(PROMPT, RESPONSE)], ["r"], 4, compact=False)
    assert not nested["return_flat_raw_top_logprobs"]
