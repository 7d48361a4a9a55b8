"""A run of benchmarks/transport.py as Markdown: bytes, seconds, and what K adds to the plain prefill."""

from __future__ import annotations

from typing import Any

from benchmarks.report import table

GOAL_SHARE = 0.05
GOAL_TOPK = 64
_FORMS = ("base64", "nested", "listed")


def plain(record: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The request for the sampled tokens alone, of that length."""
    return next(r for r in record["results"] if r["form"] == "sampled" and r["tokens"] == tokens)


def added_s(record: dict[str, Any], result: dict[str, Any]) -> float:
    """Seconds that a list adds to the prefill: on the server, on the wire, and to decode."""
    base = plain(record, result["tokens"])
    return result["wall_s"] + result["decode_s"] - base["wall_s"] - base["decode_s"]


def entry_bytes(record: dict[str, Any], result: dict[str, Any]) -> float:
    """Bytes of one entry of a list."""
    base = plain(record, result["tokens"])
    return (result["num_bytes"] - base["num_bytes"]) / (result["tokens"] * result["topk"])


def _row(record: dict[str, Any], result: dict[str, Any]) -> list[str]:
    tokens = result["tokens"]
    micro = 1e6 / tokens
    if result["form"] == "sampled":
        more = ["-", "-", "-"]
    else:
        selected = f"{result['select_s'] * micro:.1f}" if result["select_s"] else "-"
        added = f"{added_s(record, result) * micro:.1f}"
        more = [f"{entry_bytes(record, result):.1f}", added, selected]
    return [
        f"{tokens:,}",
        result["form"] if result["form"] != "sampled" else "sampled tokens alone",
        str(result["topk"]) if result["topk"] else "-",
        f"{result['num_bytes'] / tokens:,.0f}",
        f"{result['wall_s'] * micro:.1f}",
        f"{result['decode_s'] * micro:.1f}",
        *more,
    ]


def shares(record: dict[str, Any], *, with_selection: bool = True) -> dict[int, float]:
    """By length: what base64 top-64 adds, over the step time of as many tokens; empty without a run.

    Args:
        with_selection: also the server's choice of the tokens, which is no transport.
    """
    if record["run"] is None:
        return {}
    step = record["run"]["step_s_per_token"]
    return {
        r["tokens"]: (added_s(record, r) - (0.0 if with_selection else r["select_s"]))
        / r["tokens"]
        / step
        for r in record["results"]
        if r["form"] == "base64" and r["topk"] == GOAL_TOPK
    }


def _goal(record: dict[str, Any]) -> list[str]:
    found = shares(record)
    if not found:
        return ["Share of a step: not measured (no `--run`)."]
    run, worst = record["run"], max(found.values())
    verdict = "met" if worst <= GOAL_SHARE else "missed"
    alone = shares(record, with_selection=False)

    def per_length(of: dict[int, float]) -> str:
        return ", ".join(f"{share:.1%} at {tokens:,} tokens" for tokens, share in of.items())

    return [
        f"Goal: base64 top-{GOAL_TOPK} adds at most {GOAL_SHARE:.0%} of the step time of as many tokens. Measured, if "
        f"nothing of it overlapped: {per_length(found)}: {verdict}. Without the choice of the tokens, which is the "
        f"teacher's work and not transport: {per_length(alone)}.",
        f"The step is that of a finished run on the same machine: median {run['step_s']:.2f} s, "
        f"{1e6 * run['step_s_per_token']:.0f} us a response token, {run['steps']} steps. Nothing is subtracted for "
        f"overlap: groups are scored while others are generated, and {run['teacher_frac']:.1%} of the run's step time "
        f"lay between the last response and the last score.",
    ]


def render(record: dict[str, Any]) -> str:
    """Facts, the table, the goal."""
    facts = record["environment"]
    head = [
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; Python {facts['python']}, "
        f"torch {facts['torch']}; load average at the start {facts['load_average_at_start']}",
        f"- commit {facts['commit']}, {facts['date']}; V = {record['vocab_size']:,}, one layer; medians of "
        f"{record['repeats']}",
        "",
        f"Command: `{record['command']}`",
        "",
    ]
    rows = table(
        [
            "tokens",
            "form",
            "K",
            "B/token",
            "wall us/token",
            "decode us/token",
            "B/entry",
            "added us/token",
            "of it selecting",
        ],
        [_row(record, result) for result in record["results"]],
    )
    return "\n".join([*head, *rows, "", *_goal(record)])
