"""Qwen2.5-7B-Instruct learns from OpenThinker3-7B on 32 H100 GPUs: the teacher's top 32, renormalised, top-p 0.9.

Reproduces: local support matching of "Revisiting On-Policy Distillation": reverse KL over the teacher's top 32,
rollouts at top-p 0.9, special tokens masked (here all but the end of a response), batch 128, learning rate 2e-6, 16k.
Source: arXiv 2603.25562. Chosen here: prompts, 4 responses each, the batch read as prompts, and top_k, without which
the server does not state the true log-probs of truncated rollouts.
Expected: mean of its benchmarks 28.2 % to 41.5 % (teacher 56.0 %; sampled token 36.4 %, with the mask 40.7 %).
Memory: not run here; planned GiB of a GPU's 75: learner 66, rollout 62, teachers 66.
Speed: not run here; planned 484 s a step (rollout 229, teachers 34, learner 179, rest 41), 860 GPU-hours.
Prompts: deepmath-103k/train.parquet in $OPD_DATA (docs/recipes.md).
Run: `opd submit qwen2_5_7b_instruct_from_openthinker3_7b_32gpu_h100_bf16_teacher_top32 --cluster SITE`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.long_chains import long_chains


def recipe() -> Recipe:
    return change(
        long_chains(
            "Qwen/Qwen2.5-7B-Instruct",
            "open-thoughts/OpenThinker3-7B",
            "deepmath-103k/train.parquet",
        ),
        {
            "objective.estimator": "support_matching",
            "objective.measure": "renormalized",
            "objective.support": "teacher_topk",
            "objective.topk": 32,
            "objective.mask_special_tokens": "all_but_end",
            "optimizer.lr": 2e-6,
            "batch.prompts_per_step": 128,
            "rollout.top_p": 0.9,
            "rollout.top_k": 256,
            "rollout.server.num_servers": 16,
            "teachers.main.server.num_servers": 8,
            "learner.data_parallel": 8,
        },
    )
