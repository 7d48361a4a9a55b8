"""The strict checker accepts exactly the right derivations."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_megatron.demo.add2 import write_derivation
from opd_megatron.eval.column_addition import is_right_derivation

two_digits = st.integers(10, 99)


@pytest.mark.parametrize(
    "response",
    ["0+5=5,4+8=12>125", "5+0=5,8+4=12>125", "0+5=5,8+4=12>125"],
)
def test_right_derivation_is_right_in_either_operand_order(response: str) -> None:
    assert is_right_derivation("40+85:", response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "125",
        ">125",
        "0+5=5>125",
        "0+5=5,4+8=12>126",
        "0+5=5,4+8=12>0125",
        "0+5=5,4+8=13>125",  # a wrong step, a right answer
        "0+5=5,4+9=12>125",
        "0+5=5,4+8+1=12>125",  # a carry that is not there
        "4+8=12,0+5=5>125",  # columns in the wrong order
        "0+5=5,4+8=12,0+0=0>125",
        "0+5=5,4+8=12>125>125",
        "0+5=5, 4+8=12>125",
        "0+5=05,4+8=12>125",
    ],
)
def test_anything_else_is_wrong(response: str) -> None:
    assert not is_right_derivation("40+85:", response)


def test_carry_must_be_written() -> None:
    assert is_right_derivation("47+85:", "7+5=12,4+8+1=13>132")
    assert not is_right_derivation("47+85:", "7+5=12,4+8=13>132")


@pytest.mark.parametrize("prompt", ["", "40+85", "40-85:", "a+b:", "40+85:x"])
def test_nothing_is_right_for_another_kind_of_prompt(prompt: str) -> None:
    assert not is_right_derivation(prompt, "0+5=5,4+8=12>125")


def test_numbers_may_differ_in_length() -> None:
    assert is_right_derivation("7+95:", "7+5=12,0+9+1=10>102")


@given(two_digits, two_digits, st.integers(0, 99), st.data())
def test_every_written_derivation_is_right_and_no_other_digit_is(
    a: int, b: int, seed: int, data: st.DataObject
) -> None:
    example = write_derivation(f"{a}+{b}:", random.Random(seed))
    assert is_right_derivation(example.prompt, example.response)
    digits = [i for i, character in enumerate(example.response) if character.isdigit()]
    place = data.draw(st.sampled_from(digits))
    other = data.draw(st.sampled_from([d for d in "0123456789" if d != example.response[place]]))
    damaged = example.response[:place] + other + example.response[place + 1 :]
    assert not is_right_derivation(example.prompt, damaged)
