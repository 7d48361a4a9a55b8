from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.errors import ContractError, OpdError, ServerError
from opd_megatron.serving.answers import error_message
from opd_megatron.serving.contract import (
    parse_generation,
    parse_items,
    parse_score,
)
from opd_megatron.serving.fields import parse_version

VOCAB = 8
Change = Callable[[dict[str, Any]], Any]


def generation_item() -> dict[str, Any]:
    return {
        "output_ids": [4, 5, 1],
        "meta_info": {
            "id": "r/0",
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "finish_reason": {"type": "stop", "matched": 1},
            "weight_version": "3",
            "weight_versions": [
                {"version": "3", "start": 0, "end": 2},
                {"version": "4", "start": 2, "end": 3},
            ],
            "output_token_logprobs": [[-0.5, 4, None], [-1.5, 5, None], [0.0, 1, None]],
        },
    }


def read_generation(item: dict[str, Any], max_new_tokens: int = 5) -> Any:
    return parse_generation(
        item,
        rid="r",
        sent_as="r/0",
        prompt_length=2,
        vocab_size=VOCAB,
        max_new_tokens=max_new_tokens,
        server="s",
    )


def flat(array: Sequence[Sequence[float]], dtype: str) -> str:
    return base64.b64encode(np.asarray(array, dtype=dtype).tobytes()).decode()


# The first row holds the sampled token 4, the second the sampled token 1.
TOP_IDS = [[5, 4, 0], [1, 2, 3]]
TOP_LOGPROBS = [[-0.2, -2.0, -4.0], [-0.1, -3.0, -5.0]]


def score_item(nested: bool = False) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": "s/0",
        "prompt_tokens": 5,
        "completion_tokens": 0,
        "finish_reason": {"type": "length", "length": 0},
        "weight_version": "7",
        "input_token_logprobs": [[None, 6, None], [-2.0, 4, None], [-0.1, 1, None]],
    }
    if nested:
        meta["input_top_logprobs"] = [
            None,
            *(
                [[logprob, token, None] for logprob, token in zip(*row, strict=True)]
                for row in zip(TOP_LOGPROBS, TOP_IDS, strict=True)
            ),
        ]
    else:
        meta |= {
            "input_top_logprobs_val_flat_b64": flat(TOP_LOGPROBS, "<f4"),
            "input_top_logprobs_idx_flat_b64": flat(TOP_IDS, "<i4"),
            "input_top_logprobs_val_flat_b64_dtype": "float32",
            "input_top_logprobs_idx_flat_b64_dtype": "int32",
            "input_top_logprobs_shape": [2, 3],
            "input_top_logprobs_null_prefix": 1,
        }
    return {"output_ids": [], "meta_info": meta}


def read_score(item: dict[str, Any], topk: int = 3) -> Any:
    return parse_score(
        item,
        sent_as="s/0",
        prompt_ids=(2, 3, 6),
        response_ids=(4, 1),
        vocab_size=VOCAB,
        topk=topk,
    )


def put(*path: Any, value: Any) -> Change:
    """A change that sets `item[path...] = value`."""

    def change(item: dict[str, Any]) -> None:
        target: Any = item
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


def test_a_well_formed_generation_is_read() -> None:
    generation = read_generation(generation_item())
    assert generation.rid == "r"
    assert generation.token_ids == (4, 5, 1)
    assert generation.logprobs.dtype == np.float32
    assert generation.logprobs.tolist() == [-0.5, -1.5, 0.0]
    assert (generation.version_first, generation.version_last) == (3, 4)
    assert generation.finish_reason == "stop"


GENERATION_CHANGES: dict[str, Change] = {
    "another request's id": put("meta_info", "id", value="q/0"),
    "no id": lambda item: item["meta_info"].pop("id"),
    "prompt length": put("meta_info", "prompt_tokens", value=3),
    "prompt length as a boolean": put("meta_info", "prompt_tokens", value=True),
    "no finish reason": put("meta_info", "finish_reason", value=None),
    "unknown finish reason": put("meta_info", "finish_reason", value={"type": "done"}),
    "cut short but called length": put("meta_info", "finish_reason", value={"type": "length"}),
    "length that is not the number of ids": put(
        "meta_info", "finish_reason", value={"type": "length", "length": 5}
    ),
    "stopped at a token that is not the last": put(
        "meta_info", "finish_reason", "matched", value=4
    ),
    "another number of tokens": put("meta_info", "completion_tokens", value=2),
    "no ids": put("output_ids", value=[]),
    "ids are text": put("output_ids", value="451"),
    "too many ids": put("output_ids", value=[4] * 6),
    "id outside the vocabulary": put("output_ids", 1, value=VOCAB),
    "negative id": put("output_ids", 1, value=-1),
    "id is a float": put("output_ids", 1, value=5.0),
    "fewer log-probs than ids": lambda item: item["meta_info"]["output_token_logprobs"].pop(),
    "log-prob of another id": put("meta_info", "output_token_logprobs", 1, 1, value=6),
    "log-prob is null": put("meta_info", "output_token_logprobs", 0, 0, value=None),
    "log-prob is text": put("meta_info", "output_token_logprobs", 0, 0, value="-0.5"),
    "log-prob is NaN": put("meta_info", "output_token_logprobs", 0, 0, value=float("nan")),
    "log-prob is -inf": put("meta_info", "output_token_logprobs", 0, 0, value=float("-inf")),
    "log-prob is positive": put("meta_info", "output_token_logprobs", 0, 0, value=0.01),
    "log-prob is a boolean": put("meta_info", "output_token_logprobs", 0, 0, value=False),
    "log-prob is no float32": put("meta_info", "output_token_logprobs", 0, 0, value=-1e300),
    "row is too short": put("meta_info", "output_token_logprobs", 0, value=[-0.5]),
    "no versions": put("meta_info", "weight_versions", value=[]),
    "version is not a number": put("meta_info", "weight_versions", 0, "version", value="default"),
    "versions leave a gap": put("meta_info", "weight_versions", 1, "start", value=3),
    "versions overlap": put("meta_info", "weight_versions", 0, "end", value=3),
    "versions end early": lambda item: item["meta_info"]["weight_versions"].pop(),
    "versions go down": put("meta_info", "weight_versions", 1, "version", value="2"),
    "a span twice of one version": put("meta_info", "weight_versions", 1, "version", value="3"),
    "span without start": lambda item: item["meta_info"]["weight_versions"][0].pop("start"),
    "span is a list": put("meta_info", "weight_versions", 0, value=[3, 0, 2]),
}


@pytest.mark.parametrize("name", GENERATION_CHANGES)
def test_a_malformed_generation_is_refused(name: str) -> None:
    item = generation_item()
    GENERATION_CHANGES[name](item)
    with pytest.raises(ContractError, match=r"meta_info|output_ids"):
        read_generation(item)


def test_a_response_of_full_length_is_read_as_truncated() -> None:
    item = generation_item()
    item["meta_info"]["finish_reason"] = {"type": "length", "length": 3}
    assert read_generation(item, max_new_tokens=3).finish_reason == "length"


def test_an_aborted_request_is_the_servers_error() -> None:
    item = generation_item()
    item["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted"}
    with pytest.raises(ServerError, match="r/0 was aborted: Aborted"):
        read_generation(item)


@pytest.mark.parametrize("nested", [False, True])
def test_a_well_formed_score_is_read(nested: bool) -> None:
    score = read_score(score_item(nested))
    assert np.allclose(score.logprobs, [-2.0, -0.1])
    assert score.topk_ids.tolist() == TOP_IDS
    assert np.allclose(score.topk_logprobs, TOP_LOGPROBS)
    assert score.weight_version == 7


def test_top_k_is_not_looked_for_when_it_was_not_asked() -> None:
    item = score_item()
    item["meta_info"]["input_top_logprobs_val_flat_b64"] = "?"
    assert read_score(item, topk=0).topk_ids is None


B64 = "input_top_logprobs_{}_flat_b64"
SCORE_CHANGES: dict[str, Change] = {
    "another id": put("meta_info", "id", value="s/1"),
    "generated something": put("output_ids", value=[3]),
    "prompt length": put("meta_info", "prompt_tokens", value=4),
    "version": put("meta_info", "weight_version", value=7),
    "shifted by one": put(
        "meta_info",
        "input_token_logprobs",
        value=[[None, 3, None], [-3.0, 6, None], [-2.0, 4, None]],
    ),
    "one row too many": put(
        "meta_info",
        "input_token_logprobs",
        value=[[None, 3, None], [-3.0, 6, None], [-2.0, 4, None], [-0.1, 1, None]],
    ),
    "first row has a log-prob": put("meta_info", "input_token_logprobs", 0, 0, value=-1.0),
    "first row of another id": put("meta_info", "input_token_logprobs", 0, 1, value=5),
    "another id is scored": put("meta_info", "input_token_logprobs", 2, 1, value=2),
    "a log-prob is null": put("meta_info", "input_token_logprobs", 1, 0, value=None),
    "shape": put("meta_info", "input_top_logprobs_shape", value=[3, 3]),
    "no null prefix": put("meta_info", "input_top_logprobs_null_prefix", value=0),
    "values are of another dtype": put(
        "meta_info", B64.format("val") + "_dtype", value="float64"
    ),
    "values are not base64": put("meta_info", B64.format("val"), value="*"),
    "values are too few": put("meta_info", B64.format("val"), value=flat([[-1.0]], "<f4")),
    "values are missing": put("meta_info", B64.format("val"), value=None),
    "ids are missing": lambda item: item["meta_info"].pop(B64.format("idx")),
    "an id repeats": put(
        "meta_info", B64.format("idx"), value=flat([[5, 5, 0], [1, 2, 3]], "<i4")
    ),
    "an id is too large": put(
        "meta_info", B64.format("idx"), value=flat([[5, VOCAB, 0], [1, 2, 3]], "<i4")
    ),
    "not sorted": put(
        "meta_info", B64.format("val"), value=flat([[-0.2, -2, -4], [-0.1, -5, -3]], "<f4")
    ),
    "rows exchanged": lambda item: item["meta_info"].update(
        {
            B64.format("val"): flat(TOP_LOGPROBS[::-1], "<f4"),
            B64.format("idx"): flat(TOP_IDS[::-1], "<i4"),
        }
    ),
    "a sampled token is left out": put(
        "meta_info", B64.format("idx"), value=flat([[5, 3, 0], [1, 2, 3]], "<i4")
    ),
    "a top log-prob is -inf": put(
        "meta_info", B64.format("val"), value=flat([[-0.2, -2, -np.inf], [-0.1, -3, -5]], "<f4")
    ),
    "mass above one": put(
        "meta_info", B64.format("val"), value=flat([[-0.2, -0.3, -4], [-1, -3, -5]], "<f4")
    ),
    "a top log-prob is NaN": put(
        "meta_info", B64.format("val"), value=flat([[np.nan, -3, -4], [-1, -3, -5]], "<f4")
    ),
    "a top log-prob is positive": put(
        "meta_info", B64.format("val"), value=flat([[0.1, -9, -9], [-1, -3, -5]], "<f4")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORE_CHANGES)
def test_a_malformed_score_is_refused(name: str) -> None:
    item = score_item()
    SCORE_CHANGES[name](item)
    with pytest.raises(ContractError, match=r"meta_info|output_ids"):
        read_score(item)


NESTED_CHANGES: dict[str, Change] = {
    "missing": lambda item: item["meta_info"].pop("input_top_logprobs"),
    "no null first": put("meta_info", "input_top_logprobs", 0, value=[]),
    "a row is short": lambda item: item["meta_info"]["input_top_logprobs"][1].pop(),
    "a row is null": put("meta_info", "input_top_logprobs", 2, value=None),
    "an id is text": put("meta_info", "input_top_logprobs", 2, 0, 1, value="1"),
    "a value is null": put("meta_info", "input_top_logprobs", 2, 0, 0, value=None),
    "an id repeats": put("meta_info", "input_top_logprobs", 2, 0, 1, value=2),
    "an id of more than 32 bits": put("meta_info", "input_top_logprobs", 2, 2, 1, value=1 << 40),
    "a value is a boolean": put("meta_info", "input_top_logprobs", 2, 0, 0, value=False),
}


@pytest.mark.parametrize("name", NESTED_CHANGES)
def test_a_malformed_nested_top_k_is_refused(name: str) -> None:
    item = score_item(nested=True)
    NESTED_CHANGES[name](item)
    with pytest.raises(ContractError, match="input_top_logprobs"):
        read_score(item)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "code": 400}},
        {"error": "too long"},
        {"object": "error", "message": "too long"},
        {"success": False, "message": "too long"},
    ],
)
def test_each_error_shape_becomes_a_server_error_with_its_message(body: Any) -> None:
    assert error_message(body) == "too long"
    with pytest.raises(ServerError, match="too long"):
        parse_items(body, 1)


@pytest.mark.parametrize("body", [None, [], {"message": "fine"}, {"success": True, "message": "m"}])
def test_other_bodies_are_not_errors(body: Any) -> None:
    assert error_message(body) is None


@pytest.mark.parametrize(
    "body", [None, {}, "text", [], [generation_item()] * 3, [1, 2], [{"output_ids": []}] * 2]
)
def test_an_answer_of_the_wrong_shape_is_refused(body: Any) -> None:
    with pytest.raises(ContractError, match="body"):
        parse_items(body, 2)


@pytest.mark.parametrize("value", ["default", "", "-1", "1.0", 1, None, "\u00b2"])
def test_only_decimal_version_labels_are_versions(value: Any) -> None:
    with pytest.raises(ContractError, match="version"):
        parse_version("version", value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    field=st.sampled_from([*score_item()["meta_info"], *score_item(True)["meta_info"]]), value=JSON
)
def test_any_value_in_any_field_of_a_score_is_read_or_refused_but_never_crashes(
    field: str, value: Any
) -> None:
    item = score_item(nested=field == "input_top_logprobs")
    original = copy.deepcopy(item)
    item["meta_info"][field] = value
    try:
        score = read_score(item)
    except OpdError:
        return
    assert np.array_equal(score.topk_ids, read_score(original).topk_ids)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(field=st.sampled_from(["output_ids", *generation_item()["meta_info"]]), value=JSON)
def test_any_value_in_any_field_of_a_generation_is_read_or_refused_but_never_crashes(
    field: str, value: Any
) -> None:
    item = generation_item()
    (item if field == "output_ids" else item["meta_info"])[field] = value
    try:
        generation = read_generation(item)
    except OpdError:
        return
    assert generation.token_ids == (4, 5, 1)
