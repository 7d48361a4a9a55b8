"""How well a teacher fits: exact with the whole vocabulary, honest bounds and estimates with less of it."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.eval.teacher_match import Listed, match_teacher

VOCAB = 24
END = 3


def random_logprobs(seed: int, length: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(length, VOCAB)) * 2
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def listed(logprobs_LV: np.ndarray, k: int, sampled: np.ndarray) -> Listed:
    ids = np.argsort(-logprobs_LV, axis=1, kind="stable")[:, :k]
    return Listed(
        logprobs_LV[np.arange(len(sampled)), sampled].astype(np.float32),
        ids.astype(np.int32),
        np.take_along_axis(logprobs_LV, ids, axis=1).astype(np.float32),
    )


def match(student: np.ndarray, teacher: np.ndarray, k: int, sampled: np.ndarray, n: int = 4):  # type: ignore[no-untyped-def]
    pair = listed(student, k, sampled), listed(teacher, k, sampled)
    return match_teacher([pair], [sampled.tolist()], vocab_size=VOCAB, num_top=n, end_ids=(END,))


def kl(log_a: np.ndarray, log_b: np.ndarray) -> float:
    return float((np.exp(log_a) * (log_a - log_b)).sum(axis=1).mean())


def test_with_every_token_listed_both_directions_are_exact() -> None:
    student, teacher = random_logprobs(0, 50), random_logprobs(1, 50)
    sampled = np.random.default_rng(2).integers(0, VOCAB, 50)
    seen = match(student, teacher, VOCAB, sampled)
    assert seen.exact and seen.num_tokens == 50
    assert seen.reverse == pytest.approx(kl(student, teacher), rel=1e-5)
    assert seen.forward == pytest.approx(kl(teacher, student), rel=1e-5)


def test_with_fewer_tokens_forward_is_a_lower_bound_and_reverse_an_estimate_with_its_error() -> (
    None
):
    student, teacher = random_logprobs(0, 4000), random_logprobs(1, 4000)
    rng = np.random.default_rng(2)
    sampled = np.asarray([rng.choice(VOCAB, p=np.exp(row) / np.exp(row).sum()) for row in student])
    bounds = [match(student, teacher, k, sampled).forward for k in (1, 4, 12, VOCAB)]
    assert bounds == sorted(bounds) and 0 < bounds[0] < bounds[-1]
    seen = match(student, teacher, 4, sampled)
    assert not seen.exact and seen.reverse_error > 0
    assert abs(seen.reverse - kl(student, teacher)) < 4 * seen.reverse_error


def test_a_model_compared_with_itself_shares_everything() -> None:
    student = random_logprobs(0, 30)
    seen = match(student, student, 8, np.zeros(30, int))
    assert seen.reverse == pytest.approx(0, abs=1e-6) and seen.forward == pytest.approx(0, abs=1e-6)
    assert seen.overlap == 1.0 and seen.student_mass == seen.teacher_mass


def test_overlap_and_shared_mass_are_of_the_common_tokens() -> None:
    student = np.log(np.asarray([[0.4, 0.3, 0.2] + [0.1 / 21] * 21]))
    teacher = np.log(np.asarray([[0.5, 0.1 / 21, 0.1] + [0.3] + [0.1 / 21] * 20]))
    seen = match(student, teacher, VOCAB, np.zeros(1, int), n=3)
    # {0, 1, 2} and {0, 3, 2}.
    assert seen.overlap == pytest.approx(2 / 3)
    assert seen.student_mass == pytest.approx(0.6, abs=1e-6)
    assert seen.teacher_mass == pytest.approx(0.6, abs=1e-6)


def test_end_agreement_counts_positions_where_either_would_end() -> None:
    ends = np.log(np.full((1, VOCAB), 0.5 / 23))
    ends[0, END] = np.log(0.5)
    goes_on = np.log(np.full((1, VOCAB), 0.5 / 23))
    goes_on[0, 7] = np.log(0.5)
    student = np.concatenate([ends, ends, goes_on, goes_on])
    teacher = np.concatenate([ends, goes_on, ends, goes_on])
    seen = match(student, teacher, VOCAB, np.zeros(4, int))
    assert seen.end_agreement == pytest.approx(1 / 3)
    never = match(goes_on, goes_on, VOCAB, np.zeros(1, int))
    assert never.end_agreement is None


def test_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no response has a token"):
        match_teacher([], [], vocab_size=VOCAB, num_top=4, end_ids=(END,))


def test_the_forward_bound_is_what_its_definition_says_at_every_position() -> None:
    for seed, (length, k) in enumerate(((7, 3), (4, 1), (1, 6))):
        student, teacher = random_logprobs(seed, length), random_logprobs(9 + seed, length)
        sampled = np.random.default_rng(seed).integers(0, VOCAB, length)
        sides = listed(student, k, sampled), listed(teacher, k, sampled)
        wanted: list[float] = []
        for t, token in enumerate(sampled):
            ours, theirs = ({int(token), *side.ids[t].tolist()} for side in sides)
            shared = sorted(ours & theirs)
            q, p = (np.exp(row[t][shared]) for row in (teacher, student))
            q, p = (np.append(part, 1.0 - part.sum()) for part in (q, p))
            wanted.append(float((q * np.log(q / p)).sum()))
        found = match(student, teacher, k, sampled, 1).forward
        assert found == pytest.approx(np.mean(wanted), abs=1e-5)
