"""Measure what the inexact route of a served teacher costs in the loss, against the exact answer.

    python -m benchmarks.routes [--prompts 64] [--out FILE.json] [--write-docs]

The demo's student answers held-out prompts; the demo's teacher is known over its whole vocabulary of 32. Reverse KL
with a tail bucket, once with every token scored (`whole`, `listed`) and once with larger top-Ks alone
(`teacher/joint.py` does both): on supports that hold the student's choice, and on the top-K of a mean of the teacher
and the untrained student. No server: what servers answer is in tests/real.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from benchmarks import environment
from benchmarks.report import table, write_between_markers
from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.demo.make_models import response_logprobs, sample
from opd_megatron.demo.tokenizer import PAD, encode_prompt
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.served_supports import served_support
from opd_megatron.losses.support_matching import support_divergence
from opd_megatron.serving.batching import BYTES_PER_TOKEN, BYTES_PER_TOPK_ENTRY
from opd_megatron.teacher.joint import JointScores, Listing, candidates, join
from opd_megatron.teacher.target import Target

DEMO = environment.ROOT / "recipes" / "demo"
DOCS_PAGE = environment.ROOT / "docs" / "transport.md"
RESULTS = environment.ROOT / "benchmarks" / "results"
SUPPORTS = ("student_topk", "union", "symmetric_difference")
MEANS = ("arithmetic_mean", "geometric_mean")
# K of the support: larger top-Ks of the teacher.
CASES = {2: (3, 4, 8), 4: (6, 8, 16), 8: (12, 16, 24)}


def models_on(prompts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] float64 log-probs of student and teacher at the tokens of the student's answers."""
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:prompts]
    prompts_BP = torch.tensor([encode_prompt(json.loads(line)["prompt"]) for line in lines])
    student, teacher = (
        Qwen3ForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    responses_BL = sample(student, prompts_BP, torch.Generator().manual_seed(seed))
    real_BL = responses_BL != PAD
    with torch.no_grad():
        student_NV, teacher_NV = (
            response_logprobs(model, prompts_BP, responses_BL)[real_BL].double()
            for model in (student, teacher)
        )
    return student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)


def _listing(teacher_NV: torch.Tensor, asked: int) -> Listing:
    best = teacher_NV.topk(asked)
    return Listing(teacher_NV[:, 0].numpy(), best.indices.numpy(), best.values.numpy())


def of_mean(
    teacher_NV: torch.Tensor, student_NV: torch.Tensor, mean: str, k: int, asked: int
) -> JointScores:
    """The top-k of a mean of two teachers that list their top-`asked`."""
    listings = [_listing(teacher_NV, asked), _listing(student_NV, asked)]
    target = Target.of(mean, {"a": 1.0, "b": 1.0})
    ids = candidates(listings, None)
    return join(target, listings, ids, [None, None], support="teacher_topk", topk=k)


def scores(
    teacher_NV: torch.Tensor, student_NV: torch.Tensor, support: str, k: int, asked: int
) -> JointScores:
    """What a teacher that lists its top-`asked` makes of the support; or of its mean with the student."""
    if support in MEANS:
        return of_mean(teacher_NV, student_NV, support, k, asked)
    listing = _listing(teacher_NV, asked)
    student_ids = student_NV.topk(k).indices.numpy()
    ids = candidates([listing], student_ids)
    return join(
        Target.one("main"),
        [listing],
        ids,
        [None],
        support=support,
        topk=k,
        student_ids_LK=student_ids,
    )


def loss_of(
    student_NV: torch.Tensor, joint: JointScores, support: str
) -> tuple[float, torch.Tensor]:
    """Mean divergence over the tokens, and its gradient by the student's logits, [N, V]."""
    logits = student_NV.clone().requires_grad_()
    made, inputs = served_support(
        "teacher_topk" if support in MEANS else support,
        vocab_size=student_NV.shape[1],
        topk_ids_TK=torch.from_numpy(joint.ids_LJ),
        topk_logprobs_TK=torch.from_numpy(joint.logprobs_LJ),
        sampled_ids_T=torch.zeros(len(logits), dtype=torch.int64),
        sampled_logprobs_T=torch.zeros(len(logits), dtype=torch.float64),
    )
    student_NJ = logits.log_softmax(-1).gather(1, made.ids_TJ)
    divergence = make_divergence(ObjectiveConfig(divergence="reverse_kl"))
    total = support_divergence(
        divergence, student_NJ, inputs.teacher_logprobs_TJ, inputs.valid_TJ, "tail_bucket"
    ).mean()
    total.backward()
    assert logits.grad is not None
    return float(total.detach()), logits.grad


def measure(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> list[dict[str, Any]]:
    vocab_size, found = student_NV.shape[1], []
    for support in (*SUPPORTS, *MEANS):
        for k, larger in CASES.items():
            exact = scores(teacher_NV, student_NV, support, k, vocab_size)
            value, gradient = loss_of(student_NV, exact, support)
            for asked in larger:
                joint = scores(teacher_NV, student_NV, support, k, asked)
                seen, its_gradient = loss_of(student_NV, joint, support)
                missing = (exact.ids_LJ >= 0).sum() - (joint.ids_LJ >= 0).sum()
                mass = np.exp(exact.logprobs_LJ).sum(1) - np.exp(joint.logprobs_LJ).sum(1)
                found.append(
                    {
                        "support": support,
                        "topk": k,
                        "asked": asked,
                        "bytes_per_token": BYTES_PER_TOKEN + BYTES_PER_TOPK_ENTRY * asked,
                        "entries_left_out_frac": float(missing / (exact.ids_LJ >= 0).sum()),
                        "mass_left_out": float(mass.mean()),
                        "mass_bound": float(joint.left_out_L.mean()),
                        "divergence": seen,
                        "exact_divergence": value,
                        "gradient_error": float((its_gradient - gradient).norm() / gradient.norm()),
                    }
                )
    return found


def render(record: dict[str, Any]) -> str:
    header = ["support", "K", "asked", "entries left out", "teacher's mass on them", "stated bound"]
    header += ["divergence", "exact", "gradient error"]
    rows = [
        [
            row["support"] if row["support"] in SUPPORTS else f"top-K of the {row['support']}",
            str(row["topk"]),
            f"top-{row['asked']}",
            f"{row['entries_left_out_frac']:.1%}",
            f"{row['mass_left_out']:.1e}",
            f"{row['mass_bound']:.1e}",
            f"{row['divergence']:.4f}",
            f"{row['exact_divergence']:.4f}",
            f"{row['gradient_error']:.1%}",
        ]
        for row in record["results"]
    ]
    facts = record["environment"]
    head = [
        f"- commit {facts['commit']}, {facts['date']}; {record['tokens']:,} tokens, V = 32; divergences in nats",
        "",
        f"Command: `{record['command']}`",
        "",
    ]
    return "\n".join([*head, *table(header, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    parser.add_argument("--write-docs", action="store_true", help="publish: docs and results")
    args = parser.parse_args(arguments)
    student_NV, teacher_NV = models_on(args.prompts)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.routes", *arguments]),
        "environment": environment.describe("cpu"),
        "tokens": len(student_NV),
        "results": measure(student_NV, teacher_NV),
    }
    text = render(record)
    print(text)
    paths = [args.out] if args.out else []
    if args.write_docs:
        paths.append(RESULTS / "routes.json")
        write_between_markers(DOCS_PAGE, "routes", text)
    for path in paths:
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
