"""Coloured rollouts: terminal, plain text and HTML."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from opd_megatron.errors import ContractError
from opd_megatron.observe.coloring import (
    BINS,
    ColoredRollout,
    bin_of,
    rollout_html,
    rollout_plain,
    rollout_text,
)
from opd_megatron.observe.console import RunConsole

ROLLOUT = ColoredRollout(
    step=20,
    sample_id="add2-17#2",
    prompt="40+85:",
    tokens=("0", "+", "5", "=", "6"),
    advantages=(-3.0, 0.05, 0.3, -0.2, -5.0),
    weights=(1.0, 1.0, 1.0, 1.0, 0.0),
    correct=False,
    finish_reason="length",
)


def terminal(rollout: ColoredRollout) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=100)
    console.print(rollout_text(rollout))
    return stream.getvalue()


def test_bins_cover_all_advantages_without_gaps() -> None:
    assert BINS[0].low == float("-inf") and BINS[-1].high == float("inf")
    assert all(a.high == b.low for a, b in pairwise(BINS))
    for entry in BINS[1:]:
        assert bin_of(entry.low) is entry
    assert bin_of(-1e9) is BINS[0] and bin_of(1e9) is BINS[-1] and bin_of(0.0).sign == ""


def test_plain_text_marks_disagreement_with_signs() -> None:
    title, text, legend = rollout_plain(ROLLOUT).split("\n")
    assert text == "40+85: 0[---]+5[+]=[-]6[x]"
    assert title == (
        "step 20  add2-17#2  wrong, cut at the token limit  5 tokens  mean advantage -0.713 nats"
    )
    assert "[---] < -2" in legend and "[x] masked" in legend


def test_terminal_colours_are_the_bins_and_masked_tokens_have_none() -> None:
    lines = terminal(ROLLOUT).split("\n")
    assert "48;2;224;105;90m0" in lines[1]  # -3: strong red
    assert "48;2;211;229;242m5" in lines[1]  # +0.3: light blue
    assert "\x1b[9;90m6" in lines[1]  # masked: struck out, dim, no background
    assert "-0.5..-0.1" in lines[2] and "masked" in lines[2] and len(lines) == 4


def test_console_colours_only_a_terminal() -> None:
    stream = io.StringIO()
    RunConsole(80, stream).rollout(ROLLOUT)
    assert stream.getvalue() == rollout_plain(ROLLOUT) + "\n"


def test_html_is_escaped() -> None:
    html = rollout_html(replace(ROLLOUT, tokens=("<b>", "&", "</span>", '"', "<script>")))
    assert "&lt;b&gt;" in html and "&lt;script&gt;" in html
    assert "<script" not in html and "<b>" not in html
    assert html.count("<span") == html.count("</span>") == 5


def test_html_says_the_exact_numbers() -> None:
    html = rollout_html(ROLLOUT)
    assert '<span class="t n3" title="advantage -3.000 nats, weight 1.00">0</span>' in html
    assert '<span class="t masked" title="advantage -5.000 nats, weight 0.00">6</span>' in html


def test_tokens_can_not_steer_a_terminal() -> None:
    hostile = replace(ROLLOUT, tokens=("\x1b[2J", "\r", "\u202e", "\udc80", "\\n"))
    for text in (rollout_plain(hostile), terminal(hostile), str(rollout_html(hostile))):
        assert not any(char in text for char in ("\x1b[2J", "\r", "\u202e", "\udc80"))
        assert "\\x1b[2J" in text and "\\n" in text


def test_line_ends_are_visible_and_kept() -> None:
    rollout = replace(ROLLOUT, tokens=("a", "\n", "b", "c", "d"))
    assert ">\u21b5\n</span>" in rollout_html(rollout)
    assert "a[---]\\nb[+]" in rollout_plain(rollout)


def test_records_round_trip() -> None:
    assert ColoredRollout.from_record(ROLLOUT.to_record()) == ROLLOUT


def test_damaged_records_are_refused() -> None:
    record = ROLLOUT.to_record()
    with pytest.raises(ContractError, match="5 tokens, 4 advantages"):
        ColoredRollout.from_record({**record, "advantages": record["advantages"][:4]})
    with pytest.raises(ContractError, match="keys"):
        ColoredRollout.from_record({k: v for k, v in record.items() if k != "step"})


def test_an_empty_response_is_shown() -> None:
    empty = replace(ROLLOUT, tokens=(), advantages=(), weights=())
    assert "0 tokens  nothing trained" in rollout_plain(empty)
    assert rollout_html(empty) == ""
