"""The batch script itself in a real bash: what it makes of a Slurm that is busy, of noise, and of an earlier job.

`srun`, `scontrol`, `squeue`, `sbatch` and `sleep` are stand-ins on PATH that say what each test wants to hear.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_megatron.launch.slurm.render import render
from opd_megatron.launch.slurm.site import Site
from opd_megatron.launch.slurm.table import CONTROLLER, LEARNER, Component, Role, RoleTable
from opd_megatron.rundir import RunDir

# The controller ends as it is told to; every other role with it. Of the nodes n1 to n4 `$SILENT` do not start a thing;
# `$MEANWHILE` happens while they are called.
_SRUN = """
if [[ $* == */arrived/7 ]]; then
    echo call >>"$CALLS"
    for node in n1 n2 n3 n4; do [[ " ${SILENT:-} " == *" $node "* ]] || touch "${@: -1}/$node"; done
    eval "${MEANWHILE:-}"
    [[ -z ${SILENT:-} ]]
    exit
fi
[[ $* == *opd_megatron.launch.slurm.begin* ]] && { printf "$BEGIN"; exit 0; }
echo "$*" >>"$CALLS"
[[ $* == *"--role controller"* ]] && exit 75
exit 0
"""
# Fails `$BUSY` times before it answers. A job that is requeued is ended by SIGTERM, `$ENDS_S` later.
_SCONTROL = """
[[ $1 == show && $2 == hostnames ]] && { [[ -z ${NO_NAMES:-} ]] && tr , '\\n' <<<"$3"; exit; }
echo "scontrol $*" >>"$CALLS"
(($(grep -c '^scontrol' "$CALLS") > ${BUSY:-0})) || { echo 'Socket timed out' >&2; exit 1; }
[[ $1 == requeue ]] || { printf "$STATE"; exit; }
(/bin/sleep "${ENDS_S:-0}"; kill -TERM $PPID) &
"""
_SBATCH = """
echo "sbatch $*" >>"$CALLS"
echo 8
"""
_SQUEUE = """
echo "squeue" >>"$CALLS"
[[ -z ${QUEUE_DOWN:-} ]] || { echo 'Unable to contact slurm controller' >&2; exit 1; }
printf "${QUEUE:-}"
"""
RUNNING = "JobId=7 JobState=RUNNING Reason=None\\n"


@dataclass
class Scene:
    run: RunDir
    folder: Path

    def job(self, **environment: str) -> tuple[int, str, list[str]]:
        """Run the script as job 7; its exit code, its output, the calls it made."""
        calls = self.folder / "calls"
        calls.touch()
        done = subprocess.run(
            ["bash", str(self.run.slurm.script)],
            env={
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "CALLS": str(calls),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n1,n2,n3,n4",
                "BEGIN": "1\\n",
                "STATE": RUNNING,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    run = RunDir(tmp_path / "run")
    for number in ("1", "12"):
        (run.root / "attempts" / number).mkdir(parents=True)
    run.slurm.root.mkdir()
    roles = (Role(CONTROLLER, 1, 0, 0, 0, 0, 1, 1), Role(LEARNER, 1, 0, 0, 1, 0, 1, 1))
    run.slurm.script.write_text(render(Site(), RoleTable(roles, (Component(4),)), run, "opd-x"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {
        "srun": _SRUN, "scontrol": _SCONTROL, "squeue": _SQUEUE, "sbatch": _SBATCH
    }.items():  # fmt: skip
        (programs / name).write_text(f"#!/bin/bash{body}")
    (programs / "sleep").write_text("#!/bin/bash\nexit 0\n")
    for path in programs.iterdir():
        path.chmod(0o755)
    return Scene(run, tmp_path)


def test_a_failed_attempt_is_requeued(scene: Scene) -> None:
    code, output, calls = scene.job()
    assert "scontrol requeue 7" in calls and code == 75
    assert "attempt 1 ended with code 75" in output


def test_a_heterogeneous_job_is_requeued_too(scene: Scene) -> None:
    """Of its first component Slurm shows every component, each on a line of its own."""
    lines = "".join(f"JobId={7 + i} HetJobId=7 JobState=RUNNING\\n" for i in range(3))
    _, _, calls = scene.job(STATE=lines)
    assert "scontrol requeue 7" in calls


def test_nothing_outlives_a_job_that_is_requeued(scene: Scene) -> None:
    """Slurm ends the script, and may miss what that waits with: it began in the same moment."""
    (scene.folder / "bin/sleep").unlink()
    code, output, _ = scene.job(ENDS_S="0.3")  # until nothing holds its output open
    assert code == 75 and "go on with" not in output


def test_a_job_that_slurm_is_ending_is_not_requeued(scene: Scene) -> None:
    code, output, calls = scene.job(STATE=RUNNING.replace("RUNNING", "CANCELLED"))
    assert "scontrol requeue 7" not in calls and code == 75
    assert f"go on with: opd resume {scene.run.root}" in output


def test_a_busy_controller_is_asked_again(scene: Scene) -> None:
    _, output, calls = scene.job(BUSY="3")
    assert output.count("scontrol failed, try") == 3
    assert "scontrol requeue 7" in calls


def test_the_number_of_the_attempt_is_found_among_what_else_is_printed(scene: Scene) -> None:
    """A prolog, a container's banner."""
    _, output, calls = scene.job(BEGIN="== CUDA 13 ==\\nwelcome 5\\n12\\n")
    assert "attempt 12\n" in output
    assert any(call.endswith("--role controller --attempt 12") for call in calls)


def test_no_number_is_a_begin_that_failed(scene: Scene) -> None:
    _, output, calls = scene.job(BEGIN="== CUDA 13 ==\\n")
    assert "no number of an attempt in: == CUDA 13 ==" in output
    assert (scene.run.slurm.root / "begin_failures").read_text() == "1\n"
    assert "scontrol requeue 7" in calls


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED"])
def test_the_owner_of_the_directory_is_left_alone_while_it_lives(scene: Scene, state: str) -> None:
    scene.run.slurm.owner.write_text("5\n")
    code, output, calls = scene.job(QUEUE=f"15 FAILED\\n5 {state}\\n")
    assert (code, calls) == (78, ["squeue"])
    assert "job 5 is alive in" in output


@pytest.mark.parametrize(
    "queue", ["", "5 PENDING\\n", "5 FAILED\\n15 RUNNING\\n", "5 SOMETHING_NEW\\n"]
)
def test_an_owner_that_does_not_run_is_followed(scene: Scene, queue: str) -> None:
    scene.run.slurm.owner.write_text("5\n")
    _, output, _ = scene.job(QUEUE=queue)
    assert "attempt 1\n" in output


def test_an_owner_nobody_can_tell_of_is_no_configuration_error(scene: Scene) -> None:
    scene.run.slurm.owner.write_text("5\n")
    code, output, calls = scene.job(QUEUE_DOWN="1")
    assert calls.count("squeue") == 8
    assert "Slurm can not say whether job 5 is alive" in output and code == 75
    assert "attempt 1\n" not in output and "scontrol requeue 7" in calls


@pytest.mark.parametrize("silent", ["n3", "n2 n4"])
def test_nodes_on_which_nothing_starts_are_left_out(scene: Scene, silent: str) -> None:
    """A container that does not start there, a file system that is not mounted."""
    code, output, calls = scene.job(SILENT=silent)
    assert f"left out from now on: {silent}" in output and code == 75
    assert scene.run.slurm.bad_nodes.read_text().split() == silent.split()
    without = f"--exclude={silent.replace(' ', ',')}"
    assert [call for call in calls if call.startswith("sbatch") and without in call] != []
    assert calls.count("call") == 2, "they were asked twice"
    assert "attempt 1\n" not in output, "no role was started"


def test_nodes_of_every_component_are_looked_at(scene: Scene) -> None:
    roles = tuple(Role(n, 2, 0, i, 0, 0, 1, 2) for i, n in enumerate((CONTROLLER, LEARNER)))
    table = RoleTable(roles, (Component(2), Component(2)))
    scene.run.slurm.script.write_text(render(Site(), table, scene.run, "opd-x"))
    groups = {
        f"SLURM_JOB_NODELIST_HET_GROUP_{i}": nodes for i, nodes in enumerate(("n1,n2", "n3,n4"))
    }
    _, output, calls = scene.job(SILENT="n4", **groups)
    assert "left out from now on: n4" in output
    assert calls.count("call") == 4


def test_most_nodes_are_not_blamed_for_what_is_wrong_with_the_job(scene: Scene) -> None:
    code, output, calls = scene.job(SILENT="n1 n2 n4")
    assert "nothing starts on n1 n2 n4" in output and code == 75
    assert not scene.run.slurm.bad_nodes.exists()
    assert "scontrol requeue 7" in calls


def test_no_node_is_blamed_where_slurm_does_not_name_them(scene: Scene) -> None:
    code, output, _ = scene.job(SILENT="n3", NO_NAMES="1")
    assert "nothing starts on any node" in output and code == 75
    assert not scene.run.slurm.bad_nodes.exists()


@pytest.mark.parametrize(
    "reason",
    [
        {"STATE": "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00\\n"},
        {"MEANWHILE": "kill -TERM $(ps -o ppid= $(ps -o ppid= $(ps -o ppid= $$)))"},
    ],
    ids=["pre-emption with notice", "SIGTERM"],
)
def test_nodes_are_not_blamed_when_slurm_ended_the_call(
    scene: Scene, reason: dict[str, str]
) -> None:
    code, output, calls = scene.job(SILENT="n3", **reason)
    assert "nothing starts" not in output and code == 75
    assert not scene.run.slurm.bad_nodes.exists()
    assert not (scene.run.slurm.root / "begin_failures").exists(), "it does not count"
    assert "scontrol requeue 7" in calls


def test_nodes_that_never_come_up_end_the_run_after_a_few_tries(scene: Scene) -> None:
    codes = [scene.job(SILENT="n1 n2 n3 n4")[0] for _ in range(3)]
    assert codes == [75, 75, 78]


def test_bad_nodes_that_are_found_one_after_the_other_do_not_end_the_run(scene: Scene) -> None:
    codes = [scene.job(SILENT=silent)[0] for silent in ("n1", "n2", "n3", "n4")]
    assert codes == [75] * 4


def test_a_job_that_took_the_run_meanwhile_is_left_alone(scene: Scene) -> None:
    code, output, _ = scene.job(MEANWHILE=f"echo 5 >{scene.run.slurm.owner}", QUEUE="5 RUNNING\\n")
    assert "job 5 is alive in" in output and code == 78
    assert "attempt 1\n" not in output
