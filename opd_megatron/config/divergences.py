"""The divergences that a recipe can name: formula (student pi, teacher q) and source. No torch.

Each has one function in `losses/divergences.py`. The choices of `objective.divergence` and the rows of
`opd objectives` follow this table.
"""

from __future__ import annotations

DIVERGENCES = {
    "reverse_kl": ("KL(pi || q)", "Tinker, MiniLLM; k1"),
    "forward_kl": ("KL(q || pi)", "Hinton 2015 on student samples"),
    "jsd": ("w KL(q || m) + (1-w) KL(pi || m), m = w q + (1-w) pi", "Lin 1991; GKD 2306.13649"),
    "squared_hellinger": ("sum (sqrt pi - sqrt q)^2 / 2", "Csiszar 1967"),
    "alpha": ("(sum pi^a q^(1-a) - 1) / (a (a-1))", "Cichocki and Amari 2010"),
    "tsallis": ("(sum pi^a q^(1-a) - 1) / (a - 1)", "Tsallis 1998"),
    "chi2": ("sum (pi - q)^2 / q", "Pearson"),
    "total_variation": ("sum |pi - q| / 2", "f-DISTILL 2307.15190"),
}
