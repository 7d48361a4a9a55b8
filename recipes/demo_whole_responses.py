"""Two-digit addition, divergence of whole responses: every token is charged with what follows it.

Shows: `objective.discount`. At 1 the sampled-token gradient is that of the divergence between whole responses
(docs/losses.md); its variance is larger, so the learning rate matters more.
Source: the long-term term of MiniLLM (arXiv 2306.08543); "On-Policy Distillation" leaves it out (discount 0).
Expected: accuracy 31.6 % to 91.1 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.055 nats a token.
An earlier run with a third of the learning rate ended at 81.1 %.
Memory: 2.2 GiB over all processes, measured once.
Speed: 1.09 s a step, 90 s in all, measured once on two CPU cores.
Look at: train/grad_norm beside that of demo.
Run: `opd run demo_whole_responses`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "objective.discount": 1.0,
            "correction.level": "sequence",
        },
    )
