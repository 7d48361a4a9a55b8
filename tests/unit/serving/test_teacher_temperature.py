"""A served teacher's distribution at another temperature: exact with all tokens, refused with fewer."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.errors import ConfigError, ContractError
from opd_megatron.launch.preflight import check_inputs
from opd_megatron.serving.contract import ScoredResponse
from opd_megatron.teacher.temperature import at_temperature

VOCAB = 12


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def score_of(logits_LV: np.ndarray, k: int, sampled: list[int]) -> ScoredResponse:
    logprobs = log_softmax(logits_LV)
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    listed = np.take_along_axis(logprobs, ids, axis=1)
    rows = np.arange(len(sampled))
    return ScoredResponse(
        logprobs[rows, sampled].astype(np.float32),
        3,
        ids.astype(np.int32),
        listed.astype(np.float32),
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_with_every_token_listed_it_is_exact(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)) * 3
    sampled = [3, 0, 11, 7]
    seen = at_temperature(score_of(logits, VOCAB, sampled), temperature, VOCAB)
    wanted = log_softmax(logits / temperature)
    assert seen.topk_ids is not None and seen.topk_logprobs is not None
    found = np.take_along_axis(wanted, seen.topk_ids.astype(np.int64), axis=1)
    assert np.allclose(seen.topk_logprobs, found, atol=1e-5)
    assert np.allclose(seen.logprobs, wanted[np.arange(4), sampled], atol=1e-5)


def test_with_fewer_tokens_the_normaliser_is_unknown() -> None:
    score = score_of(np.zeros((1, VOCAB)), VOCAB - 1, [2])
    with pytest.raises(ContractError, match="11 of 12 tokens"):
        at_temperature(score, 0.5, VOCAB)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "asks the server for none of its 32 tokens"),
        (["objective.estimator=support_matching", "objective.topk=31"], "for 31 of its 32 tokens"),
    ],
)
def test_a_served_teacher_that_can_not_be_exact_is_refused(
    overrides: list[str], words: str
) -> None:
    demo = load_recipe("demo")[0]
    both = ["rollout.temperature=0.7", "teachers.main.temperature=0.7"]
    with pytest.raises(ConfigError, match=words):
        check_inputs(apply_overrides(demo, [*both, *overrides]))
    allowed = [["objective.topk=32", "objective.estimator=support_matching"]]
    allowed.append(["teachers.main.engine=in_process"])
    for more in allowed:
        check_inputs(apply_overrides(demo, [*both, *more]))


def test_two_different_temperatures_need_permission() -> None:
    demo = apply_overrides(
        load_recipe("demo")[0], ["teachers.main.engine=in_process", "teachers.main.temperature=0.7"]
    )
    with pytest.raises(
        ConfigError, match=r"teachers.main.temperature=0.7: the student would learn"
    ):
        check_inputs(demo)
    check_inputs(apply_overrides(demo, ["objective.allow_biased=true"]))
    check_inputs(apply_overrides(demo, ["rollout.temperature=0.7"]))


def test_k_beyond_the_vocabulary_is_refused() -> None:
    demo = load_recipe("demo")[0]
    with pytest.raises(ConfigError, match=r"objective.topk=33: the vocabulary has 32 tokens; set"):
        check_inputs(
            apply_overrides(demo, ["objective.estimator=support_matching", "objective.topk=33"])
        )
