"""Two-digit addition, token filter: only the 30 % of tokens with the largest log-ratio train.

Shows: tokens chosen by what they would teach. Percentiles are of the step batch. The filter chooses by the token that
it trains, which tilts the expected gradient, so it needs `allow_biased`.
Source: the filter KL 70-100 of "On-Policy Distillation Adventures".
Expected: accuracy 31.6 % to 90.9 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.034 nats a token.
Memory: 2.2 GiB over all processes, measured once.
Speed: 1.06 s a step, 88 s in all, measured once on two CPU cores.
Look at: train/filter_kept_frac.
At scale: qwen3_4b_base_from_qwen3_4b_16gpu_gb200_bf16_kl_70_100
Run: `opd run demo_kl_filter`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "filter.score": "kl",
            "filter.low": 70.0,
            "filter.high": 100.0,
            "objective.allow_biased": True,
        },
    )
