"""Two-digit addition, asynchronous: the student writes while the learner trains, and gets new weights in mid-sentence.

Shows: rollouts go on beside the learner's step. A token may be two versions old (`max_staleness`); new weights are
broadcast through a process group instead of files.
Source: rollouts with a staleness bound as in AReaL (arXiv 2505.24298); docs/decisions/0026-overlap-with-a-bound.md.
Expected: accuracy 31.6 % to 89.6 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.041 nats a token.
Memory: 2.3 GiB over all processes, measured once.
Speed: 0.74 s a step, 80 s in all, measured once on two CPU cores.
On two cores a step takes about 30 % less time than that of demo (docs/benchmarks.md).
Look at: offpolicy/token_age_mean; offpolicy/mixed_frac, the share of samples that more than one version wrote.
Run: `opd run demo_async`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "overlap.mode": "async",
            "max_staleness": 2,
            "weight_sync.route": "broadcast",
        },
    )
