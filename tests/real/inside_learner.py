"""One teacher asked twice: on a real SGLang server, and inside a two-rank learner that holds the same weights."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from opd_megatron.exchange.batch_file import write_batch
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.teacher.in_process import unscored
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.types import Rollout, Sample

REPOSITORY = Path(__file__).parents[2]
TOPK = 8


@dataclass(frozen=True)
class Agreement:
    """Largest differences in nats; whether the top-K ids are the same; the KL between student and teacher."""

    sampled_nats: float
    topk_nats: float
    same_topk_ids: bool
    kl: float
    num_tokens: int


async def asked_twice(
    client: SglangClient,
    prompts: tuple[tuple[int, ...], ...],
    student: Path,
    teacher: Path,
    work: Path,
) -> Agreement:
    """Let the server's model write, then score that on the server and in a learner with tensor parallelism.

    Args:
        client: of a server that holds `teacher`.
        student: another model directory; the learner trains one.
    """
    rids = [f"p{i}@0#0" for i in range(len(prompts))]
    sampling = Sampling(temperature=1.0, max_new_tokens=24)
    generations = await client.generate(prompts, sampling, rids)
    rollouts = [
        Rollout(rid, rid, prompt, g.token_ids, g.logprobs, g.finish_reason, 0, 0, client.name)
        for rid, prompt, g in zip(rids, prompts, generations, strict=True)
    ]
    routes = ["main"] * len(rollouts)
    pool = ServerPool("main", [client], return_timeout_s=5, say=print)
    pool.admit(client, (await client.model_info()).weight_version)
    try:
        scores = await score_rollouts({"main": pool}, rollouts, routes, topk=TOPK)
    finally:
        await pool.close()
    samples = [Sample(rollout, unscored(rollout, "main")) for rollout in rollouts]
    inside = await asyncio.to_thread(_learner_scores, samples, student, teacher, work)
    ids = np.concatenate([score.topk_ids for score in scores])  # type: ignore[misc]
    logprobs = np.concatenate([score.topk_logprobs for score in scores])  # type: ignore[misc]
    sampled = np.concatenate([score.sampled_logprobs for score in scores])
    return Agreement(
        sampled_nats=float(np.abs(inside["teacher_logprobs"] - sampled).max()),
        topk_nats=float(np.abs(inside["topk_logprobs"] - logprobs).max()),
        same_topk_ids=bool(np.array_equal(inside["topk_ids"], ids)),
        kl=float(inside["kl_reverse"].mean()),
        num_tokens=len(sampled),
    )


def _learner_scores(
    samples: list[Sample], student: Path, teacher: Path, work: Path
) -> dict[str, Any]:
    write_batch(work / "batch.safetensors", 1, 0, samples)
    for name, model in (("student", student), ("teacher", teacher)):
        (work / name).symlink_to(model)
    worker = str(Path(__file__).with_name("megatron_teacher_worker.py"))
    launch = [sys.executable, "-m", "opd_megatron.megatron.torchrun", "--opd-fork"]
    run = subprocess.run(
        [*launch, "--nproc-per-node", "2", worker, str(work), "served"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return load_file(work / "scores.safetensors")
