"""Which version wrote which token, from the rollout to the learner's refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opd_megatron.errors import ContractError
from opd_megatron.exchange.batch_file import read_index, write_batch
from opd_megatron.exchange.staleness import check_staleness
from opd_megatron.types import Rollout, Sample, TeacherScores


def sample(name: str, first: tuple[int, int], *more: tuple[int, int]) -> Sample:
    """A sample by its spans: (version, end)."""
    spans = (first, *more)
    length = spans[-1][1]
    zeros = np.zeros(length, np.float32)
    ids = tuple(range(length))
    several = spans if more else ()
    rollout = Rollout(
        name, "p", (1,), ids, zeros, "stop", spans[0][0], spans[-1][0], "s", spans=several
    )
    return Sample(rollout, TeacherScores("main", zeros))


def check(tmp_path: Path, samples: list[Sample], version: int, max_staleness: int) -> None:
    path = tmp_path / "batch"
    write_batch(path, version + 1, version, samples)
    check_staleness(read_index(path), version, max_staleness)


def test_every_token_has_the_version_that_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    write_batch(path, 6, 5, [sample("a#0", (5, 2)), sample("b#0", (3, 1), (4, 3), (5, 4))])
    assert read_index(path).token_versions.tolist() == [5, 5, 3, 4, 4, 5]


def test_tokens_within_the_bound_are_trained(tmp_path: Path) -> None:
    check(tmp_path, [sample("a#0", (5, 2)), sample("b#0", (3, 1), (5, 4))], 5, 2)
    check(tmp_path, [], 5, 0)


def test_one_token_beyond_the_bound_refuses_the_batch(tmp_path: Path) -> None:
    samples = [sample("a#0", (5, 2)), sample("b#0", (4, 3), (5, 4))]
    with pytest.raises(
        ContractError, match="sample b#0, response token 0: made by weight version 4"
    ):
        check(tmp_path, samples, 5, 0)


def test_a_token_of_the_future_refuses_the_batch(tmp_path: Path) -> None:
    samples = [sample("a#0", (5, 1), (6, 3))]
    with pytest.raises(ContractError, match="a#0, response token 1: made by weight version 6"):
        check(tmp_path, samples, 5, 9)


def test_a_batch_for_other_weights_than_the_learners_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    write_batch(path, 6, 5, [sample("a#0", (5, 2))])
    with pytest.raises(ContractError, match="for weight version 5, the learner holds 6"):
        check_staleness(read_index(path), 6, 9)


@pytest.mark.parametrize(
    "spans",
    [
        ((3, 1), (4, 3)),  # too few tokens
        ((3, 1), (3, 4)),  # not a newer version
        ((4, 1), (3, 4)),
        ((3, 2), (4, 2), (5, 4)),  # an empty stretch
        ((2, 1), (5, 4)),  # begins with another version than the first
        (),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="rollout a#0: spans"):
        Rollout(
            "a#0", "p", (1,), (1, 2, 3, 4), np.zeros(4, np.float32), "stop", 3, 5, "s", spans=spans
        )
