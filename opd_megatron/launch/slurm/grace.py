"""Is a site's notice (`cluster.grace_s`) long enough for a commit? Predicted at submission, measured later.

    bytes     P parameters x 14 (bf16 weights, float32 master copy and two moments), 12 with fp32 weights
    seconds   written, then read back and hashed, each at the planner's rate of a file system (an assumption)

The end of a step comes before the commit and needs its own seconds; a running attempt adds what it measured
(controller/grace.py). A prediction only warns: nobody knows a site's file system before the first commit.
"""

from __future__ import annotations

import json
from typing import cast

from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.offline import model_facts
from opd_megatron.launch.planner.hardware import EFFICIENCY
from opd_megatron.launch.planner.work import parameters
from opd_megatron.launch.slurm.site import Site
from opd_megatron.rundir import RunDir

_MOMENTS_AND_MASTER = 12
_COMMIT_S = b'"perf/commit_s"'


def commit_bytes(recipe: Recipe) -> int:
    """Bytes of model and optimizer in a commit.

    Raises:
        ConfigError: the student's sizes are not known here.
    """
    weights = 0 if recipe.learner.precision == "fp32" else 2
    arch = model_facts(recipe.student.path, "student.path").architecture
    return parameters(arch) * (_MOMENTS_AND_MASTER + weights)


def predicted(recipe: Recipe, site: Site) -> str:
    """What a commit of this recipe takes against the site's notice, in one line."""
    if site.grace_s == 0:
        return "commit: cluster.grace_s=0, so the time limit costs the steps since the last commit"
    try:
        size = commit_bytes(recipe)
    except ConfigError:
        return f"commit: not predicted, the sizes of {recipe.student.path} are not known here"
    seconds = 2 * size / EFFICIENCY.disk_bytes_s
    rate = 2 * size / site.grace_s / 1e9
    line = (
        f"commit: {size / 1e9:,.3g} GB, {seconds:,.3g} s where {EFFICIENCY.disk_bytes_s / 1e9:g} GB/s are written and "
        f"read; cluster.grace_s={site.grace_s} is for this and the end of a step"
    )
    if seconds < site.grace_s:
        return line
    return (
        f"warning: {line}: too short unless files move at {rate:,.1f} GB/s; raise cluster.grace_s"
    )


def measured_s(run: RunDir) -> float | None:
    """Seconds of the newest commit whose time was recorded."""
    if not run.metrics.exists():
        return None
    rows = [line for line in run.metrics.read_bytes().splitlines() if _COMMIT_S in line]
    return cast(float, json.loads(rows[-1])["perf/commit_s"]) if rows else None


def measured(run: RunDir, grace_s: int) -> str | None:
    """The newest commit against the notice, in one line; None where none was measured."""
    seconds = measured_s(run)
    if seconds is None:
        return None
    line = f"the newest commit took {seconds:.1f} s, cluster.grace_s={grace_s}"
    if seconds < grace_s:
        return line
    return f"warning: {line}: too short; change the line `--signal=B:USR1@{grace_s}` of {run.slurm.script}"
