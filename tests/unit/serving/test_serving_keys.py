from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.serving.keys import ServerKeys, new_keys, read_keys, write_keys


def test_keys_survive_the_file_and_only_their_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = new_keys()
    write_keys(path, keys)
    assert read_keys(path) == keys
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_draws_give_four_different_long_keys() -> None:
    first, second = new_keys(), new_keys()
    keys = {first.api, first.admin, second.api, second.admin}
    assert len(keys) == 4
    assert min(map(len, keys)) >= 40


def test_the_representation_hides_the_keys() -> None:
    keys = new_keys()
    assert keys.api not in f"{keys!r} {keys}"
    assert keys.admin not in f"{keys!r} {keys}"


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, new_keys())
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640"):
        read_keys(path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"api": "a"}),
        json.dumps({"api": "a", "admin": 1}),
        json.dumps({"api": "a", "admin": ""}),
        json.dumps({"api": "same", "admin": "same"}),
        json.dumps({"api": "a", "admin": "b", "more": "c"}),
    ],
)
def test_a_malformed_file_is_refused_without_showing_its_content(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.json") as caught:
        read_keys(path)
    assert "same" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must exist"):
        read_keys(tmp_path / "keys.json")


def test_keys_compare_by_value() -> None:
    assert ServerKeys("a", "b") == ServerKeys("a", "b") != ServerKeys("a", "c")
