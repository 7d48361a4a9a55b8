"""Two-digit addition: a tiny, noisy Qwen3 student learns from a tiny Qwen3 teacher on two CPU cores.

Shows: the whole loop in small. The student writes, the teacher scores each token it wrote, a Megatron learner of two
tensor-parallel ranks descends KL(student || teacher); both SGLang servers are real. The keys below are those that one
changes first, as recipes/families/demo.py has them; `opd recipes show demo` prints all.
Source: the sampled-token reverse KL of "On-Policy Distillation" (Thinking Machines 2025); task and models are ours.
Expected: accuracy 31.6 % to 91.5 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.039 nats a token.
Memory: 2.2 GiB over all processes, measured once.
Speed: 1.03 s a step, 87 s in all, measured once on two CPU cores.
Look at: train/kl_reverse falls, train/advantage_mean rises to 0, eval/heldout/accuracy nears the teacher's.
Run: `make demo`, or `opd run demo`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "steps": 60,
            "objective.divergence": "reverse_kl",
            "objective.estimator": "policy_gradient",
            "optimizer.lr": 1e-3,
            "batch.prompts_per_step": 64,
            "batch.rollouts_per_prompt": 4,
            "learner.tensor_parallel": 2,
        },
    )
