"""One response, every token coloured by its advantage: the most useful screen of distillation.

The advantage of a token is `log q - log pi` in nats: how much more the teacher (q) likes it than
the student (pi). Seven bins with round limits, the same in every picture, so that early and late
steps can be compared:

    red   the teacher gives it less      <= -2, -2..-0.5, -0.5..-0.1
    none  they agree                     |advantage| < 0.1
    blue  the teacher gives it more      0.1..0.5, 0.5..2, >= 2

Red against blue is readable for colour-blind people. Tokens with weight 0 do not train; they are
dimmed. Records live in `rollouts.jsonl`, a few per step, written with `JsonlWriter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup, escape
from rich.text import Text

from opd_megatron.errors import ContractError
from opd_megatron.observe.formats import encodable, visible

ROLLOUTS_JSONL = "rollouts.jsonl"


@dataclass(frozen=True, slots=True)
class Bin:
    """A range of advantages, `low <= advantage < high`, and how it is shown."""

    low: float
    high: float
    words: str
    color: str  # background; the text on it is black
    css: str
    sign: str  # stands for the colour where there is none


BINS = (
    Bin(float("-inf"), -2.0, "< -2", "#e0695a", "n3", "---"),
    Bin(-2.0, -0.5, "-2..-0.5", "#f4a995", "n2", "--"),
    Bin(-0.5, -0.1, "-0.5..-0.1", "#fbdcd2", "n1", "-"),
    Bin(-0.1, 0.1, "about 0", "", "z0", ""),
    Bin(0.1, 0.5, "0.1..0.5", "#d3e5f2", "p1", "+"),
    Bin(0.5, 2.0, "0.5..2", "#9cc7e3", "p2", "++"),
    Bin(2.0, float("inf"), "> 2", "#529fd0", "p3", "+++"),
)
_DIM = "bright_black"
_RETURN_SIGN = "\u21b5"


@dataclass(frozen=True, slots=True)
class ColoredRollout:
    """A record of rollouts.jsonl.

    Example: `ColoredRollout(step=20, sample_id="add2-17#2", prompt="40+85:", tokens=("0", "+",
    "5"), advantages=(-0.31, 0.02, 0.0), weights=(1.0, 1.0, 0.0), correct=True,
    finish_reason="stop")`.

    `weights` are the importance weights of the loss, 0 where a token is masked; `correct` is None
    without a grader.
    """

    step: int
    sample_id: str
    prompt: str
    tokens: tuple[str, ...]
    advantages: tuple[float, ...]
    weights: tuple[float, ...]
    correct: bool | None
    finish_reason: str

    def __post_init__(self) -> None:
        lengths = (len(self.tokens), len(self.advantages), len(self.weights))
        if len(set(lengths)) != 1:
            raise ContractError(
                f"sample {self.sample_id}: {lengths[0]} tokens, {lengths[1]} advantages and "
                f"{lengths[2]} weights must be equally many"
            )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ColoredRollout:
        """The inverse of `to_record`.

        Raises:
            ContractError: a key is missing or unknown, or the lengths differ.
        """
        expected = set(cls.__dataclass_fields__)
        if set(record) != expected:
            raise ContractError(
                f"rollout record has keys {sorted(record)}, expected {sorted(expected)}"
            )
        sequences = {key: tuple(record[key]) for key in ("tokens", "advantages", "weights")}
        return cls(**{**record, **sequences})

    def to_record(self) -> dict[str, Any]:
        """Plain values for a line of rollouts.jsonl."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """`right`, `wrong` or `not graded`, and `cut` when it hit the token limit."""
        graded = {True: "right", False: "wrong", None: "not graded"}[self.correct]
        return f"{graded}, cut at the token limit" if self.finish_reason == "length" else graded

    @property
    def mean_advantage(self) -> float | None:
        """Mean over the tokens that train, in nats; None when there are none."""
        trained = [a for a, w in zip(self.advantages, self.weights, strict=True) if w != 0]
        return sum(trained) / len(trained) if trained else None


def bin_of(advantage: float) -> Bin:
    """The bin of an advantage in nats."""
    return next((b for b in BINS if advantage < b.high), BINS[-1])


def _token_text(token: str) -> str:
    """Line ends stay line ends, with a sign that makes them visible."""
    return f"{_RETURN_SIGN}\n".join(visible(line) for line in token.split("\n"))


def _title(rollout: ColoredRollout) -> str:
    mean = rollout.mean_advantage
    mean_words = "nothing trained" if mean is None else f"mean advantage {mean:+.3f} nats"
    return (
        f"step {rollout.step}  {visible(rollout.sample_id)}  {rollout.verdict}  "
        f"{len(rollout.tokens)} tokens  {mean_words}"
    )


def rollout_text(rollout: ColoredRollout, encoding: str | None = None) -> Text:
    """The response for a terminal: title, prompt and coloured response, legend with numbers.

    Args:
        encoding: of the terminal; what it can not hold is escaped.
    """
    text = Text(_title(rollout) + "\n", style="bold")
    text = Text.assemble(text, (encodable(visible(rollout.prompt), encoding) + " ", "italic"))
    tokens = zip(rollout.tokens, rollout.advantages, rollout.weights, strict=True)
    for token, advantage, weight in tokens:
        color = bin_of(advantage).color
        style = f"black on {color}" if color else ""
        if weight == 0:
            style = f"strike {_DIM}"
        text.append(encodable(_token_text(token), encoding), style=style)
    text.append("\nadvantage in nats: ")
    for entry in BINS:
        text.append(f" {entry.words} ", style=f"black on {entry.color}" if entry.color else "")
    text.append(" masked", style=f"strike {_DIM}")
    return text


def rollout_plain(rollout: ColoredRollout) -> str:
    """The response for a log file: signs after the tokens on which the models disagree."""
    words = [visible(rollout.prompt), " "]
    tokens = zip(rollout.tokens, rollout.advantages, rollout.weights, strict=True)
    for token, advantage, weight in tokens:
        sign = "x" if weight == 0 else bin_of(advantage).sign
        words.append(visible(token) + (f"[{sign}]" if sign else ""))
    legend = "  ".join(f"[{b.sign}] {b.words}" for b in BINS if b.sign)
    return f"{_title(rollout)}\n{''.join(words)}\nadvantage in nats: {legend}  [x] masked"


def rollout_html(rollout: ColoredRollout) -> Markup:
    """The response as escaped spans of class `t` and the bin's class, exact numbers as tooltips."""
    spans: list[Markup] = []
    tokens = zip(rollout.tokens, rollout.advantages, rollout.weights, strict=True)
    for token, advantage, weight in tokens:
        css = "masked" if weight == 0 else bin_of(advantage).css
        tip = f"advantage {advantage:+.3f} nats, weight {weight:.2f}"
        spans.append(
            Markup('<span class="t {}" title="{}">{}</span>').format(
                css, tip, escape(_token_text(token))
            )
        )
    return Markup("").join(spans)
