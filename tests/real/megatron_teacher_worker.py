"""Runs under torchrun: teachers inside the learner against `transformers`, in layouts that cut batch and model.

    torchrun --nproc-per-node 2|4 megatron_teacher_worker.py WORK_DIRECTORY teachers|served

Three teachers score one batch: `small` has the student's size, `big` another one, an alias, and weights that are
offloaded between uses; the samples of `served` bring their scores along. Where only teachers inside the learner score,
two means of them take turns with them. Rank 0 writes WORK_DIRECTORY/<what>.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_cases import LENGTHS, TOPK, VOCAB, Case
from megatron_reference import Reference, reference_model, reference_run
from megatron_setup import new_state, recipe_for, relative, run_worker, snapshot, step_on
from megatron_teacher_reference import ALIAS, scored, teacher_logprobs, token_losses_of
from megatron_tiny import make_samples, write_model
from safetensors.torch import save_file

from opd_megatron.config.schema import (
    CorrectionConfig,
    FilterConfig,
    ObjectiveConfig,
    Recipe,
    TeacherConfig,
)
from opd_megatron.exchange.batch_file import read_batch, read_index, write_batch
from opd_megatron.megatron.compare import compare
from opd_megatron.megatron.step import packed_batch
from opd_megatron.megatron.teacher_pass import score_in_process
from opd_megatron.teacher.in_process import unscored
from opd_megatron.teacher.target import Target
from opd_megatron.types import Sample

MEANS = (
    Target.of("arithmetic_mean", {"small": 3.0, "big": 1.0}).name,
    Target.of("geometric_mean", {"small": 0.4, "big": 0.6}).name,
)
GIVEN = [0, 7, 135, 136, 200, 258, 200]
BIG = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6}
LAYOUTS = {
    "dp2": Case(),
    "tp2_sp": Case({"tensor_parallel": 2, "sequence_parallel": True}),
    "tp2_chunked_loss": Case({"tensor_parallel": 2, "loss_mode": "chunked"}),
    "pp2": Case({"pipeline_parallel": 2}, padded=True),
    "pp2_interleaved": Case({"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "cp2": Case({"context_parallel": 2}),
}
COMBINED = {
    "tp2_pp2_sp": Case({"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True}),
    "tp2_cp2_sp": Case({"tensor_parallel": 2, "context_parallel": 2, "sequence_parallel": True}),
    "tp2_dp2_sp": Case({"tensor_parallel": 2, "sequence_parallel": True}),
    "pp2_cp2": Case({"pipeline_parallel": 2, "context_parallel": 2}),
    "pp2_dp2_interleaved": Case({"pipeline_parallel": 2, "virtual_pipeline": 2}),
}


def _support(support: str, divergence: str = "reverse_kl", **more: Any) -> ObjectiveConfig:
    return ObjectiveConfig(
        estimator="support_matching", support=support, divergence=divergence, topk=TOPK, **more
    )


# Without `served`: its samples have no score outside its own top-K.
EXACT = {
    "full reverse_kl": _support("full", report_overlap=True),
    "full forward_kl": _support("full", "forward_kl"),
    "full jsd": _support("full", "jsd", jsd_teacher_weight=0.3),
    "union": _support("union"),
}
OBJECTIVES = {"sampled": ObjectiveConfig(), "teacher_topk": _support("teacher_topk"), **EXACT}
FEW = ("sampled", "full reverse_kl", "union")
# Which objectives a layout is run with; a chunked loss has no logits to take a top-K of.
CASES = {
    "tp2_sp": tuple(OBJECTIVES),
    "tp2_chunked_loss": ("sampled", "teacher_topk", "full forward_kl", "full jsd"),
    "pp2_interleaved": tuple(OBJECTIVES),
}
IDENTITY = {"tp2_sp", "pp2_interleaved"}


def samples_of(names: tuple[str, ...]) -> list[Sample]:
    """The teachers take turns; only `served` has scores."""
    samples = []
    for i, sample in enumerate(make_samples(LENGTHS[0], VOCAB, seed=3, topk=TOPK)):
        name = names[i % len(names)]
        scores = dataclasses.replace(sample.scores, teacher=name)
        if name != "served":
            scores = unscored(sample.rollout, name, TOPK if "served" in names else 0)
        samples.append(dataclasses.replace(sample, scores=scores))
    return samples


def teachers_of(work: Path) -> dict[str, TeacherConfig]:
    one, other = ALIAS
    return {
        "small": TeacherConfig(path=str(work / "small"), engine="in_process"),
        "big": TeacherConfig(
            path=str(work / "big"),
            engine="in_process",
            offload=True,
            aliases={f"t{one}": f"t{other}"},
        ),
        "served": TeacherConfig(path=str(work / "small")),
    }


def write_models(work: Path) -> None:
    student = write_model(work / "student", vocab_size=VOCAB)
    (student / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(VOCAB)}))
    write_model(work / "small", vocab_size=VOCAB, seed=5, tied=True)
    write_model(work / "big", "qwen3", False, 6, vocab_size=VOCAB, **BIG)


# ---------------------------------------------------------------- a case


def recipe_of(work: Path, case: Case, objective: str) -> Recipe:
    recipe = recipe_for(work / "student", case)
    return dataclasses.replace(recipe, objective=OBJECTIVES[objective], teachers=teachers_of(work))


def step_case(
    work: Path, case: Case, objective: str, batch: Path, reference: Reference | None
) -> dict[str, Any] | None:
    """One step: loss, norm, gradients and weights against the single process."""
    state = new_state(recipe_of(work, case, objective), case)
    state.load_hf(work / "student")
    result = step_on(state, batch)
    gradient, weights = snapshot(state, "gradient"), snapshot(state)
    if reference is None:
        return None
    clipped = reference.clipped_gradients[0]
    return {
        "why_not_applied": result.why_not_applied,
        "loss": abs(result.metrics["train/loss"] / reference.losses[0] - 1),
        "norm": abs(result.metrics["train/grad_norm"] / reference.norms[0] - 1),
        "gradient": max(relative(gradient[n], clipped[n]) for n in clipped),
        "weights": max(
            float((weights[n] - reference.weights[n]).abs().max()) for n in reference.weights
        ),
        "overlap": result.metrics.get("train/support_overlap_frac"),
        "teacher_s": result.timings["teacher_s"],
    }


def score_case(
    work: Path, case: Case, batch: Path, log_q: dict[str, torch.Tensor]
) -> dict[str, float] | None:
    """Sampled, top-K, given-id and full-vocabulary scores, in batch order, against `transformers`."""
    state = new_state(recipe_of(work, case, "sampled"), case)
    state.load_hf(work / "student")
    index = read_index(batch)

    def read(samples: Any) -> Any:
        return read_batch(batch, samples)

    first, second = (compare(state, index, read) for _ in range(2))
    best = _topk_of(state, index, read, GIVEN)
    if dist.get_rank() != 0:
        return None
    whole = read_batch(batch)
    order = [s for s in whole.sample_ids if s in log_q]
    q_NV = torch.cat([log_q[s] for s in order])
    responses = [t[p:] for t, p in zip(whole.tokens, whole.prompt_lengths, strict=True)]
    ids_N = torch.cat([torch.from_numpy(r).long() for r in responses])
    student = reference_model(work / "student", torch.float64)
    with torch.no_grad():
        log_p = [
            student(torch.from_numpy(t)[None].long()).logits[0].log_softmax(-1)[p - 1 : -1]
            for t, p in zip(whole.tokens, whole.prompt_lengths, strict=True)
        ]
    p_NV = torch.cat(log_p)

    def off(name: str, wanted: torch.Tensor) -> float:
        return float((first[name] - wanted).abs().max())

    top = q_NV.topk(TOPK)
    return {
        "sampled": off("teacher_logprobs", q_NV.gather(1, ids_N[:, None])[:, 0]),
        "entropy": off("teacher_entropy", -(q_NV.exp() * q_NV).sum(1)),
        "full reverse": off("kl_reverse", (p_NV.exp() * (p_NV - q_NV)).sum(1)),
        "full forward": off("kl_forward", (q_NV.exp() * (q_NV - p_NV)).sum(1)),
        "topk ids": float((best[0] != top.indices).sum()),
        "topk": float((best[1] - top.values).abs().max()),
        "given ids": float((best[2] - q_NV[:, GIVEN]).abs().max()),
        "second time": max(float((first[n] - second[n]).abs().max()) for n in first),
    }


def filtered_case(
    work: Path, case: Case, batch: Path, log_q: dict[str, torch.Tensor]
) -> dict[str, Any] | None:
    """The teacher's exact entropy chooses the upper half of the tokens."""
    recipe = dataclasses.replace(
        recipe_of(work, case, "full reverse_kl"),
        filter=FilterConfig(score="teacher_entropy", low=50),
        correction=CorrectionConfig(kind="none"),
    )
    state = new_state(recipe, case)
    state.load_hf(work / "student")
    result = step_on(state, batch)
    if dist.get_rank() != 0:
        return None
    q_NV = torch.cat([log_q[s] for s in read_batch(batch).sample_ids if s in log_q])
    entropy_N = -(q_NV.exp() * q_NV).sum(1)
    wanted_N = (entropy_N[:, None] > entropy_N).double().mean(1) >= 0.5
    return {
        "kept": int(wanted_N.sum()),
        "chosen otherwise": int(((result.values["losses"] != 0) != wanted_N).sum()),
        "entropy": abs(result.metrics["teacher/entropy"] - float(entropy_N[wanted_N].mean())),
    }


def identity_case(work: Path, case: Case) -> dict[str, float]:
    """A teacher with the student's own files: the largest KL of a token, and of log-probs."""
    recipe = recipe_for(work / "student", case)
    own = TeacherConfig(path=str(work / "student"), engine="in_process")
    state = new_state(dataclasses.replace(recipe, teachers={"own": own}), case)
    state.load_hf(work / "student")
    batch = work / "own.safetensors"
    if dist.get_rank() == 0:
        write_batch(batch, 1, 0, samples_of(("own",)))
    dist.barrier()
    values = compare(state, read_index(batch), lambda samples: read_batch(batch, samples))
    apart = values["student_logprobs"] - values["teacher_logprobs"]
    return {
        "kl_reverse": float(values["kl_reverse"].abs().max()),
        "kl_forward": float(values["kl_forward"].abs().max()),
        "logprobs": float(apart.abs().max()),
    }


def _topk_of(state: Any, index: Any, read: Any, given: list[int]) -> list[torch.Tensor]:
    """Top-K ids, their log-probs, and the log-probs of given ids, in batch order."""
    micro_batches = packed_batch(state, index, read)
    teachers = score_in_process(state, index, micro_batches, keep_hidden=True)
    assert teachers is not None
    rows: list[tuple[torch.Tensor, ...]] = []
    if state.groups.is_last_stage:
        from opd_megatron.megatron.forward import to_device

        for micro in micro_batches:
            batch = to_device(micro, state.groups, state.device)
            head, hidden_TH = teachers.kept.of(batch)
            logits = head.logits(hidden_TH)
            ids_TK = logits.topk(TOPK)
            given_TJ = torch.tensor(given).expand(len(ids_TK), -1)
            found = [
                logits.stats(batch.target_ids_T, ids).support_logprobs_TJ
                for ids in (ids_TK, given_TJ)
            ]
            rows.append((batch.output_index_T, ids_TK, *found))  # type: ignore[arg-type]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    size = index.num_response_tokens
    whole = [
        torch.zeros(size, TOPK, dtype=torch.int64),
        torch.zeros(size, TOPK),
        torch.zeros(size, len(given)),
    ]
    for where, *values in (row for rank in gathered for row in rank):
        for target, value in zip(whole, values, strict=True):
            target[where[where >= 0]] = value[where >= 0]
    return whole


def teachers(work: Path) -> dict[str, Any]:
    layouts = LAYOUTS if dist.get_world_size() == 2 else COMBINED
    batches = {False: work / "mixed.safetensors", True: work / "in_process.safetensors"}
    routes = {False: ("small", "served", "big"), True: ("small", "big", *MEANS)}
    samples = {exact: samples_of(names) for exact, names in routes.items()}
    references: dict[str, Reference] = {}
    log_q: dict[bool, dict[str, torch.Tensor]] = {}
    if dist.get_rank() == 0:
        write_models(work)
        for exact, path in batches.items():
            write_batch(path, 1, 0, samples[exact])
            log_q[exact] = teacher_logprobs(work, samples[exact])
        for objective in OBJECTIVES:
            exact = objective in EXACT
            references[objective] = reference_run(
                work / "student",
                [scored(samples[exact], log_q[exact])],
                token_losses_of(objective, log_q[exact]),
            )
    dist.barrier()
    results: dict[str, Any] = {}
    for name, case in layouts.items():
        results[f"scores-{name}"] = score_case(work, case, batches[True], log_q.get(True, {}))
        for objective in CASES.get(name, FEW):
            results[f"{objective}-{name}"] = step_case(
                work, case, objective, batches[objective in EXACT], references.get(objective)
            )
    results |= {f"identity-{name}": identity_case(work, LAYOUTS[name]) for name in IDENTITY}
    results["filtered"] = filtered_case(work, LAYOUTS["tp2_sp"], batches[True], log_q.get(True, {}))
    return results


def served(work: Path) -> dict[str, Any]:
    """Scores of WORK/batch.safetensors by the teacher `main` at WORK/teacher, for comparison with a server's."""
    case = Case({"tensor_parallel": 2})
    recipe = recipe_for(work / "student", case)
    config = TeacherConfig(path=str(work / "teacher"), engine="in_process")
    state = new_state(dataclasses.replace(recipe, teachers={"main": config}), case)
    state.load_hf(work / "student")
    batch = work / "batch.safetensors"
    index = read_index(batch)

    def read(samples: Any) -> Any:
        return read_batch(batch, samples)

    values = compare(state, index, read)
    ids_NK, logprobs_NK, _ = _topk_of(state, index, read, [0])
    if dist.get_rank() == 0:
        values |= {"topk_ids": ids_NK, "topk_logprobs": logprobs_NK}
        save_file(values, work / "scores.safetensors")
    return {}


if __name__ == "__main__":
    torch.manual_seed(0)
    run_worker({"teachers": teachers, "served": served})
