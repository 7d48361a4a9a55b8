"""Graders by name, and the rule that a cut response is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd_megatron.errors import ConfigError, DataError
from opd_megatron.eval.grading import GRADERS, check_answers, make_grader
from opd_megatron.eval.math_verify_grader import MathVerifyGrader
from opd_megatron.types import Prompt


def test_graders_are_these_three() -> None:
    assert list(GRADERS) == ["column_addition", "exact_match", "math_verify"]


def test_unknown_grader_is_a_config_error_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.grader='exact'.*did you mean 'exact_match'"):
        make_grader("exact")


@pytest.mark.parametrize(
    ("name", "response", "right"),
    [
        ("exact_match", " 125\n", True),
        ("exact_match", "126", False),
        ("exact_match", "0+5=5,4+8=12>125", False),
        ("column_addition", "0+5=5,4+8=12>125", True),
        ("column_addition", "125", False),
    ],
)
def test_verdicts(name: str, response: str, right: bool) -> None:
    grader = make_grader(name)
    assert grader("40+85:", response, "125", True) is right
    assert grader("40+85:", response, "125", False) is False


def test_column_addition_disagrees_with_a_wrong_answer_in_the_data() -> None:
    grader = make_grader("column_addition")
    assert not grader("40+85:", "0+5=5,4+8=12>125", "25", True)
    assert grader("40+85:", "0+5=5,4+8=12>125", None, True)


def test_held_out_prompt_without_answer_is_named() -> None:
    prompt = Prompt("a", (1,), "x", None, None, "heldout.jsonl:3")
    with pytest.raises(DataError, match=r"heldout\.jsonl:3: prompt 'a' has no answer"):
        check_answers([prompt])


def test_math_verify_without_its_package_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_megatron.eval.math_verify_grader.PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install math-verify"):
        make_grader("math_verify")


@pytest.fixture(scope="module")
def math_grader() -> Iterator[MathVerifyGrader]:
    grader = MathVerifyGrader(timeout_s=3.0, workers=1)
    yield grader
    grader.close()


def test_callers_in_many_threads_get_the_verdict_of_their_own_response(
    math_grader: MathVerifyGrader,
) -> None:
    def verdict(number: int) -> bool:
        return math_grader("", f"\\boxed{{{number}}}", str(number - number % 3), True)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(verdict, range(90))) == [number % 3 == 0 for number in range(90)]


def test_math_verify_compares_values_and_survives_a_response_that_never_parses(
    math_grader: MathVerifyGrader,
) -> None:
    assert math_grader("", "so \\boxed{\\frac{2}{4}}", "1/2", True)
    assert not math_grader("", "so \\boxed{3}", "1/2", True)
    assert not math_grader("", "so \\boxed{1/2}", "1/2", False)
    assert not math_grader("", "\\boxed{9^{9^{9^{9}}}}", "3", True)
    assert math_grader("", "\\boxed{3}", "3", True)
