"""Two-digit addition: a tiny, noisy Qwen3 student learns from a tiny Qwen3 teacher on two CPU cores.

Reproduces, in small, the sampled-token reverse-KL result: a capable but noisy student reaches its teacher.
Expected: accuracy above 85 % from 32 %, with a teacher of 97 %, in about two minutes (README.md has a measured line).
"""

from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return addition()
