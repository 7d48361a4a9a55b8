"""Makes the modules beside the tests importable (`whole_runs`, `kill_runs`), and starts a Slurm where one can be."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_cluster import Cluster, missing_programs

SLURM_NODES = 5


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
