"""Makes the modules beside the tests importable (`whole_runs`, `kill_runs`), and starts a Slurm where one can be."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_cluster import Cluster, missing_programs

SLURM_NODES = 5
# They take longest and start first, so that none is left to run alone at the end.
LONGEST = (
    "test_slurm_long.py",
    "test_slurm_nemo.py",
    "test_slurm_jobs.py",
    "test_megatron_commits.py",
    "test_overlap_runs.py",
    "test_whole_run.py",
    "test_megatron_learner.py",
    "test_megatron_layouts.py",
    "test_weight_sync.py",
    "test_minimal_opd.py",
    "test_faults.py",
    "test_megatron_resume.py",
    "test_probe.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Needs `--no-loadscope-reorder`: xdist would start the file with the most tests first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster]:
    """A Slurm of this session's own, with five virtual nodes."""
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"NO SLURM HERE: {', '.join(missing)} missing; scripts/install_slurm.sh installs them on Debian as root"
        )
    made = Cluster(tmp_path_factory.mktemp("slurm"), SLURM_NODES)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def cluster(slurm: Cluster) -> Generator[Cluster]:
    """It, without a job before and after."""
    yield slurm
    slurm.cancel_all()
