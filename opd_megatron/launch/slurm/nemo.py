"""NeMo-Run as the submitter: it writes the `sbatch` file, carries it to the cluster and keeps an experiment's record.

What runs is our job script, to which NeMo-Run's hands over in its `setup_lines` (`exec bash RUN/slurm/job.sh`), before
its own exports, `srun` lines and end of job. So roles, requeues and exit codes are the same with and without NeMo-Run,
and what is known to go wrong in 0.11.1 can not reach a run:

    values of environment variables are not quoted, names are upper-cased     none are given to it
    variables of one role leak into the next                                  the same
    `set -x` shows values in the log                                          the same; the job script says `set +x`
    a launcher that gives up ends with 0: success                             the job script's exit code is the job's
    `--gpus-per-node=None` and the like                                       `verify` reads the script before it goes
    status needs sacct                                                        `opd status` asks scontrol (queue.py)
    `sbatch --requeue` on the command line, over the script's `--no-requeue`  refused together with `requeue: false`

It runs in a process of its own (nemo_main.py), with its home inside the run directory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from opd_megatron.errors import ConfigError, ServerError
from opd_megatron.launch.slurm.queue import refusal
from opd_megatron.launch.slurm.render import sbatch_lines
from opd_megatron.launch.slurm.site import Site
from opd_megatron.launch.slurm.submit import Job, job_name, write_job
from opd_megatron.rundir import RunDir

HOME = "nemo-run"
TITLE = "opd"
_TIMEOUT_S = 300
_NO_VALUE = re.compile(r"=\s*['\"]?(None|null)['\"]?\s*$")
_EXPORT = re.compile(r"^\s*export (\w+)=")
# What NeMo-Run's own template exports.
_OWN_EXPORTS = {"PYTHONUNBUFFERED", "SLURM_UNBUFFEREDIO", "TORCHX_MAX_RETRIES"}


def check(site: Site) -> None:
    """
    Raises:
        ConfigError: NeMo-Run is not installed, or can not carry a site's placement.
    """
    if importlib.util.find_spec("nemo_run") is None:
        raise ConfigError.of(
            "--via", "nemo-run", "is not installed", "make install-launch, or say --via sbatch"
        )
    if site.placement == "het":
        raise ConfigError.of(
            "cluster.placement",
            "het",
            "NeMo-Run gives every component the first one's --segment and rewrites --output",
            "say --via sbatch, or placement=slices",
        )
    if not site.requeue:
        raise ConfigError.of(
            "cluster.requeue", False, "NeMo-Run submits with `sbatch --requeue`", "say --via sbatch"
        )
    if site.ssh_host:
        for key in ("ssh_user", "ssh_job_dir", "python"):
            if not getattr(site, key) and not (key == "python" and site.container_image):
                raise ConfigError.of(f"cluster.{key}", "", "is needed with ssh_host", "set it")


def hand_over(job: Job) -> str:
    return f"exec bash {shlex.quote(str(job.run.slurm.script))}"


def request_of(job: Job) -> dict[str, Any]:
    """What nemo_main.py needs: every `#SBATCH` option by name, and the line that hands over."""
    options: dict[str, str | bool] = {}
    for line in sbatch_lines(job.site, job.table, job.run, job_name(job.recipe)):
        name, equals, value = line.removeprefix("--").partition("=")
        options[name.replace("-", "_")] = value if equals else True
    site = job.site
    tunnel = None
    if site.ssh_host:
        tunnel = {
            "host": site.ssh_host, "port": site.ssh_port, "user": site.ssh_user, "job_dir": site.ssh_job_dir,
            "identity": site.ssh_identity or None,
        }  # fmt: skip
    return {
        "title": TITLE,
        "nodes": job.table.nodes,
        "options": options,
        "setup_lines": hand_over(job),
        "wanted": sbatch_lines(job.site, job.table, job.run, job_name(job.recipe)),
        "tunnel": tunnel,
    }


def verify(script: str, request: Mapping[str, Any]) -> None:
    """Read what NeMo-Run made of a request before it is submitted.

    Raises:
        ServerError: an option without value, an option of ours that is missing, a variable that is not its own, or no
            hand-over.
    """
    lines = script.splitlines()
    flags = [
        shlex.split(line.removeprefix("#SBATCH "))[0]
        for line in lines
        if line.startswith("#SBATCH ")
    ]
    for line in lines:
        export = _EXPORT.match(line)
        if line.startswith("#SBATCH") and _NO_VALUE.search(line):
            raise ServerError(f"NeMo-Run wrote an option without a value: {line}")
        if export and export[1] not in _OWN_EXPORTS:
            raise ServerError(f"NeMo-Run exports a variable that nobody gave it: {export[1]}")
    missing = [line for line in request["wanted"] if line not in flags]
    if missing:
        raise ServerError(f"NeMo-Run left out {', '.join(missing)}")
    first_srun = next((i for i, line in enumerate(lines) if line.startswith("srun ")), len(lines))
    if request["setup_lines"] not in lines[:first_srun]:
        raise ServerError("NeMo-Run's script does not hand over to the job script")


def _run(action: str, request: dict[str, Any], home: Path) -> dict[str, Any]:
    """One call of nemo_main.py; its noise is shown only when it fails, and then Slurm's words alone if there are any.

    Raises:
        ConfigError: Slurm refused the job.
        ServerError: it failed otherwise.
    """
    answer = home / "answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "opd_megatron.launch.slurm.nemo_main", action, str(answer)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            env={**os.environ, "NEMORUN_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerError(
            f"NeMo-Run: no answer after {_TIMEOUT_S} s; see with squeue whether the job is there"
        ) from error
    if done.returncode or not answer.exists():
        text = (done.stdout + done.stderr).strip()
        refused = [line for line in text.splitlines() if line.startswith("sbatch: ")]
        if refused:
            raise refusal("\n".join(refused))
        raise ServerError(f"NeMo-Run ended with exit code {done.returncode}:\n{text[-3000:]}")
    return cast(dict[str, Any], json.loads(answer.read_text()))


def dry_run(job: Job) -> str:
    """The `sbatch` file NeMo-Run would submit, verified. Asks nothing of Slurm and writes nothing that stays.

    Raises:
        ServerError: as `verify`.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = str(_run("dry-run", request_of(job), Path(folder))["script"])
    return script.replace(folder, str(job.run.slurm.root / HOME))


def submit(job: Job) -> str:
    """Submit a job whose run directory is written; returns its id.

    Raises:
        ConfigError, ServerError: as `verify` and `_run`.
    """
    home = job.run.slurm.root / HOME
    home.mkdir(exist_ok=True)
    return str(_run("submit", request_of(job), home)["job"])


def submit_over_ssh(job: Job, source: dict[str, object]) -> str:
    """Write the run directory here, carry it over, and submit there.

    Raises:
        ConfigError, ServerError: as `submit`, or the other side could not be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = RunDir(Path(folder) / "run")
        write_job(job, source, staged)
        files = [path for path in sorted(staged.root.rglob("*")) if path.is_file()]
        carried = {str(path): str(job.run.root / path.relative_to(staged.root)) for path in files}
        request = request_of(job) | {"files": carried, "jobs": str(job.run.slurm.jobs)}
        home = Path(folder) / HOME
        home.mkdir()
        return str(_run("submit", request, home)["job"])
