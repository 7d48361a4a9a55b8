"""A site file is read as its author wrote it, and each mistake in it or on the command line is said in its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.cli.app import main
from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm.site import Site, limit_s, load_site


def written(folder: Path, text: str) -> str:
    path = folder / "site.yaml"
    path.write_text(text)
    return str(path)


def test_scalars_stay_as_they_are_written(tmp_path: Path) -> None:
    """YAML 1.1 reads 12:00:00 as 43200 (thirty days, for Slurm), `yes` as true and 012 as ten."""
    text = "time: 12:00:00\nexclusive: no\ncpus_per_node: 8\ndevices_per_node: 4\nenvironment:\n  A: yes\n  B: 012\n"
    site = load_site(written(tmp_path, text), ["cluster.environment.C=on"])
    assert (site.time, limit_s(site)) == ("12:00:00", 12 * 3600)
    assert site.exclusive is False and site.devices_per_node == 4
    assert site.environment == {"A": "yes", "B": "012", "C": "on"}


def test_lists_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "setup: [module load a]\ncontainer_mounts:\n  - /a:/a\n")
    site = load_site(path, ["cluster.setup=[module load b, 'echo 1, 2']"])
    assert site.setup == ["module load b", "echo 1, 2"] and site.container_mounts == ["/a:/a"]


def test_an_empty_value_is_the_empty_text(tmp_path: Path) -> None:
    site = load_site(written(tmp_path, "partition:\naccount: ''\n"))
    assert (site.partition, site.account) == ("", Site().account)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exclusive: perhaps\n", "exclusive='perhaps': must be true or false"),
        ("devices_per_node: 4.5\n", "devices_per_node='4.5': must be a whole number"),
        ("setup: module load x\n", "setup='module load x': must be a list"),
        ("partition: {x: 1}\n", "partition={'x': '1'}: must be text"),
        ("environment: [a]\n", "must map names to text"),
        ("Time: 3\n", "did you mean 'time'"),
        ("a: [\n", "not readable as YAML"),
        ("partition\n", "not a mapping of site keys"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert str(caught.value).startswith(path) and words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.devices_per_node=two", "cluster.devices_per_node='two': must be a whole number"),
        ("cluster.container_mounts=/a:/b", "cluster.container_mounts='/a:/b': must be a list"),
        ("cluster.setup=[a", "cluster.setup='[a': must be a list"),
        ("cluster.environment=x", "cluster.environment='x': must map names to text"),
        ("cluster.partiton=x", "cluster.partiton: no such site key, did you mean 'partition'"),
        ("cluster.time", "has no value"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_key_as_it_was_typed(
    override: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_site("generic", [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["partition=batch"], "write cluster.partition=batch"),
        (["--cluster", "/nowhere/site.yaml"], "no such file"),
    ],
)
def test_a_forgotten_prefix_and_a_missing_file_are_said_so(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["submit", "demo", "--cluster", "cpu-test", "--dry-run", *arguments])
    assert stop.value.code == 78
    assert words in capsys.readouterr().err
