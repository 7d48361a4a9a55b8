"""What a run prints: start-up messages, one line per step, coloured rollouts, the last line.

    [rollout-0] ready after 41s
    step 12/80 loss 0.183 kl 0.071 keep 0.98 len 17.5 tok/s 2.1k eta 1m52s
    step 20/80 loss 0.140 kl 0.052 keep 0.99 len 17.5 tok/s 2.1k eta 1m44s
    held-out after step 20: accuracy 73.2% kl 0.049 (teacher 96.6%)

Plain text when the stream is not a terminal. Left out on purpose: progress bars and live displays,
which make logs unreadable.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from opd_megatron.observe.coloring import ColoredRollout, rollout_plain, rollout_text
from opd_megatron.observe.formats import encodable, human_count, human_duration

_ETA_WINDOW = 20  # steps: long enough to smooth a slow one, short enough to follow a change of pace


def _number(row: Mapping[str, Any], name: str, spec: str) -> str:
    return format(row[name], spec) if name in row else "-"


def step_line(row: Mapping[str, Any], total_steps: int, eta_s: float | None) -> str:
    """One training step in one line; a metric that was not measured shows as `-`.

    Args:
        row: a row of metrics.jsonl.
        total_steps: steps of the whole run.
        eta_s: expected seconds until the last step is done, None when unknown.
    """
    width = len(str(total_steps))
    masked, tokens, step_s = (
        row.get(name) for name in ("offpolicy/masked_frac", "train/tokens", "perf/step_s")
    )
    keep = "-" if masked is None else f"{1 - masked:.2f}"
    length = human_count(row["rollout/len_mean"]) if "rollout/len_mean" in row else "-"
    speed = human_count(tokens / step_s) if tokens is not None and step_s else "-"
    parts = [
        f"step {row['step']:>{width}}/{total_steps}",
        f"loss {_number(row, 'train/loss', '.3f')}",
        f"kl {_number(row, 'train/kl_reverse', '.3f')}",
        *([f"age {row['offpolicy/age_mean']:.1f}"] if row.get("offpolicy/age_max") else []),
        f"keep {keep}",
        f"len {length}",
        f"tok/s {speed}",
    ]
    if row.get("train/skipped"):
        parts.append(f"SKIPPED {row['train/skipped']:.0f}")
    parts.append(f"eta {'-' if eta_s is None else human_duration(eta_s)}")
    return " ".join(parts)


def evaluation_line(row: Mapping[str, Any]) -> str | None:
    """What the evaluation after a step measured, None when there was none.

    The teacher is measured once, so only the first line names it.
    """
    if "eval/heldout/accuracy" not in row:
        return None
    when = f"after step {row['step']}" if row["step"] else "before training"
    parts = [f"held-out {when}: accuracy {row['eval/heldout/accuracy']:.1%}"]
    if "eval/heldout/kl_reverse" in row:
        parts.append(f"kl {row['eval/heldout/kl_reverse']:.3f}")
    if "eval/heldout/teacher_accuracy" in row:
        parts.append(f"(teacher {row['eval/heldout/teacher_accuracy']:.1%})")
    return " ".join(parts)


def result_line(summary: Mapping[str, Any]) -> str:
    """The last line of a run with an evaluation, from the content of summary.json."""
    accuracy = f"accuracy {summary['accuracy_before']:.1%} \u2192 {summary['accuracy_after']:.1%}"
    if summary["teacher_accuracy"] is not None:
        accuracy += f" (teacher {summary['teacher_accuracy']:.1%})"
    parts = [accuracy]
    if summary["kl_before"] is not None:
        parts.append(f"KL {summary['kl_before']:.3f} \u2192 {summary['kl_after']:.3f} nats/token")
    parts += [f"{summary['steps']} steps", f"{summary['wall_s']:.0f} s"]
    return f"{summary['recipe']}: " + " \u00b7 ".join(parts)


class RunConsole:
    """Prints lines of a run to one stream.

    Args:
        total_steps: steps of the whole run.
        stream: where to print; standard output when None.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._rich = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._recent_s: deque[float] = deque(maxlen=_ETA_WINDOW)

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line as it is, never wrapped."""
        line = encodable(text, self._stream.encoding)
        self._rich.print(Text(line, style=style or ""), soft_wrap=True)
        self._stream.flush()

    def role(self, role: str, text: str) -> None:
        """A start-up or life-cycle message of one process: `[rollout-0] ready after 41s`."""
        self.say(f"[{role}] {text}")

    def step(self, row: Mapping[str, Any]) -> None:
        """The line of a step, with the time left judged by the last steps, and that of its evaluation.

        Step 0 is the student before training: only its evaluation is shown.
        """
        if row["step"] > 0:
            self.say(step_line(row, self._total_steps, self._eta_s(row)))
        evaluation = evaluation_line(row)
        if evaluation is not None:
            self.say(evaluation)

    def _eta_s(self, row: Mapping[str, Any]) -> float | None:
        if "perf/step_s" in row:
            self._recent_s.append(row["perf/step_s"] + row.get("perf/eval_s", 0.0))
        if not self._recent_s:
            return None
        mean_s = sum(self._recent_s) / len(self._recent_s)
        return mean_s * max(self._total_steps - row["step"], 0)

    def rollout(self, rollout: ColoredRollout) -> None:
        """One response with its tokens coloured by advantage; signs instead of colours in a log."""
        if self._rich.is_terminal:
            self._rich.print(rollout_text(rollout, self._stream.encoding))
        else:
            self.say(rollout_plain(rollout))
