"""100,000 hostile texts pass through rendered scripts in a real bash and arrive as they were, byte for byte.

The script runs as it is; `srun`, `scontrol` and `squeue` are stand-ins on PATH. The stand-in for srun writes down the
arguments and the environment it was started with.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
from pathlib import Path

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm import render as rendering
from opd_megatron.launch.slurm.render import quote, render
from opd_megatron.launch.slurm.site import Site
from opd_megatron.launch.slurm.table import CONTROLLER, Component, Role, RoleTable
from opd_megatron.rundir import RunDir

TEXTS = 100_000
_ROLES = 50
_VARIABLES = 1000  # hostile too, and the same for every role
_PIECES = [
    *"'\"\\$`!*?[]{}()<>|&;#~^%=:, \t\n\r-+.0aZ",
    "$(touch hacked)", "`touch hacked`", "${HOME}", "$HOME", "'; touch hacked; '", '"; touch hacked; "',
    "\n#SBATCH --nodes=99", "\nEOF\n", "{{ 7 * 7 }}", "{% raw %}", "--help", "\x01\x7f\x1b[2J",
    "\u00e9\u4e2d\U0001f600", "\u2028", "\u202e", "%j", "%s", "\\n", "$'\\x41'", "!!", "=None", "~root", "*/../*",
]  # fmt: skip

_SRUN = """#!/bin/bash
[[ ${!#} == */arrived/* ]] && exit
for ((i = 1; i <= $#; i++)); do [[ ${!i} == opd_megatron.launch.slurm.begin ]] && { echo 1; exit; }; done
printf '%s\\0' "$@" >"$SEEN/$$.argv"
env -0 >"$SEEN/$$.env"
"""


def hostile(generator: random.Random) -> str:
    return "".join(generator.choices(_PIECES, k=generator.randrange(1, 6)))


def stand_ins(folder: Path) -> None:
    for name, text in (
        ("srun", _SRUN),
        ("scontrol", "#!/bin/bash\necho JobState=COMPLETED\n"),
        ("squeue", "#!/bin/bash\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.mark.many
def test_hostile_texts_arrive_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    environment = {f"V{i}": hostile(generator) for i in range(_VARIABLES)}
    arguments = {
        f"role-{r}": [hostile(generator) for _ in range(TEXTS // _ROLES)] for r in range(_ROLES)
    }
    real = rendering.words
    # The last argument list of a role is its command: hostile texts take its place.
    roles = [Role(CONTROLLER, 1, 0, 0, 0, 0, 1, 1)]
    roles += [Role(name, 1, 0, 0, 1, 0, 1, 1) for name in arguments]

    def with_hostile(argv: list[str]) -> str:
        return real([*argv, *arguments.get(argv[-1], [])])

    monkeypatch.setattr(rendering, "words", with_hostile)
    run, seen = RunDir(tmp_path / "run"), tmp_path / "seen"
    (run.root / "attempts" / "1").mkdir(parents=True)
    run.slurm.root.mkdir()
    seen.mkdir()
    where = Site(environment=environment, server_restarts=0)
    script = render(where, RoleTable(tuple(roles), (Component(1),)), run, "opd-x")
    (tmp_path / "job.sh").write_text(script)
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins(programs)
    subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen), "SLURM_JOB_ID": "1"},
        stdout=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    checked = 0
    for path in seen.glob("*.argv"):
        got = path.read_bytes().decode().split("\0")[:-1]
        name = got[got.index("--role") + 1]
        if name == CONTROLLER:
            continue
        texts = arguments.pop(name)
        start = got.index(name) + 1
        assert got[start : start + len(texts)] == texts
        lines = path.with_suffix(".env").read_bytes().decode().split("\0")
        found = {key: value for key, _, value in (line.partition("=") for line in lines)}
        assert {key: found[key] for key in environment} == environment
        checked += len(texts)
    assert arguments == {}
    assert checked == TEXTS
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_what_no_shell_word_can_hold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        quote(text)
    broken = dataclasses.replace(Site(), environment={"A": text})
    role = Role(CONTROLLER, 1, 0, 0, 0, 0, 1, 1)
    with pytest.raises(ConfigError):
        render(broken, RoleTable((role,), (Component(1),)), RunDir(Path("/r")), "opd-x")
