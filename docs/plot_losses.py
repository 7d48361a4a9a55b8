"""Draws docs/losses.svg: advantage of a sampled token against log(pi / q), a curve per divergence.

python docs/plot_losses.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from opd_megatron.config.schema import ObjectiveConfig
from opd_megatron.losses.divergences import DIVERGENCES, make_divergence

matplotlib.use("svg")
# A fixed salt and no date: the same curves give the same file.
matplotlib.rcParams["svg.hashsalt"] = "opd"

from matplotlib import pyplot as plt  # noqa: E402

TARGET = Path(__file__).with_name("losses.svg")
LABELS = {"jsd": "jsd (w = 1/2)", "alpha": "alpha (a = 1.5)", "tsallis": "tsallis (a = 1.5)"}


def main() -> None:
    """Write the picture."""
    log_r = torch.linspace(-3, 3, 301, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in DIVERGENCES:
        divergence = make_divergence(ObjectiveConfig(divergence=name, alpha=1.5))
        advantage = -divergence.derivative(log_r)
        axes.plot(log_r.numpy(), advantage.numpy(), label=LABELS.get(name, name))
    axes.axhline(0.0, color="gray", linewidth=0.5)
    axes.axvline(0.0, color="gray", linewidth=0.5)
    axes.set_ylim(-4, 4)
    axes.set_xlabel("log(pi / q): right, the student likes the token more than the teacher")
    axes.set_ylabel("advantage A of the sampled token")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
