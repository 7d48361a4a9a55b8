"""Two-digit addition, two optimizer updates on every step batch, clipped as PPO clips.

Shows: more than one update on a step batch, so the second is off-policy. Also a warm-up and a cosine schedule, data
parallelism with a distributed optimizer instead of tensor parallelism, and saves beside the training.
Source: the clipped surrogate of PPO (arXiv 1707.06347).
Expected: accuracy 31.6 % to 93.8 % (teacher 96.4 %), KL(student || teacher) 0.742 to 0.018 nats a token.
Memory: 2.3 GiB over all processes, measured once.
Speed: 1.07 s a step, 88 s in all, measured once on two CPU cores.
Look at: train/clipped_frac, the share of tokens whose gradient the clip took away.
Run: `opd run demo_two_updates`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "batch.updates_per_step": 2,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 5,
            "optimizer.min_lr": 0.0001,
            "learner.tensor_parallel": 1,
            "learner.data_parallel": 2,
            "learner.distributed_optimizer": True,
            "checkpoint.async_save": True,
        },
    )
