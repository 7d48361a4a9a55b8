# pyright: basic
# NeMo-Run has no type information to be strict about.
"""The process that imports NeMo-Run: `python -m opd_megatron.launch.slurm.nemo_main submit|dry-run ANSWER < request`.

Apart from the rest because importing it takes seconds, it prints at will, and it leaves by `sys.exit` when a login
fails. `NEMORUN_HOME`, read at import, is set by the caller.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from opd_megatron.atomic import write_json
from opd_megatron.errors import OpdError
from opd_megatron.launch.slurm.nemo import verify

# Reached only when bash could not start the job script.
_NOT_HANDED_OVER = "exit 70"


def _tunnel(run: Any, request: dict[str, Any]) -> Any:
    wanted = request["tunnel"]
    return run.SSHTunnel(**wanted) if wanted else run.LocalTunnel(job_dir="")


def _executor(run: Any, request: dict[str, Any], tunnel: Any) -> Any:
    return run.SlurmExecutor(
        account=None,
        nodes=request["nodes"],
        ntasks_per_node=1,
        tunnel=tunnel,
        packager=run.Packager(),
        container_image=None,
        job_name_prefix="opd.",
        setup_lines=request["setup_lines"],
        additional_parameters=request["options"],
        env_vars={},
        retries=0,
    )


def _experiment(run: Any, request: dict[str, Any], tunnel: Any) -> Any:
    experiment = run.Experiment(request["title"], skip_status_at_exit=True)
    with experiment:
        task = run.Script(inline=_NOT_HANDED_OVER)
        experiment.add(task, executor=_executor(run, request, tunnel), name="job")
        yield experiment


def dry_run(request: dict[str, Any]) -> dict[str, Any]:
    """What NeMo-Run would submit, verified. Asks nobody, on this side or the other."""
    import nemo_run as run  # pyright: ignore[reportMissingImports]

    for experiment in _experiment(run, request, run.LocalTunnel(job_dir="")):
        experiment.dryrun(log=False, delete_exp_dir=False)
        script = Path(experiment._exp_dir) / "job_sbatch.sh"
    text = script.read_text()
    verify(text, request)
    return {"script": text, "folder": str(script.parent)}


def carry(tunnel: Any, files: dict[str, str]) -> None:
    """Put files on the other side; an existing run is not written over."""
    folders = sorted({str(Path(there).parent) for there in files.values()})
    for there in files.values():
        if there.endswith("run.yaml"):
            tunnel.run(f"test ! -e {shlex.quote(there)}")
    tunnel.run("mkdir -p " + " ".join(shlex.quote(folder) for folder in folders))
    for here, there in files.items():
        tunnel.put(here, there)


def submit(request: dict[str, Any]) -> dict[str, Any]:
    import nemo_run as run  # pyright: ignore[reportMissingImports]

    shutil.rmtree(dry_run(request)["folder"])
    tunnel = _tunnel(run, request)
    if request["tunnel"]:
        carry(tunnel, request["files"])
    for experiment in _experiment(run, request, tunnel):
        experiment.run(detach=True, tail_logs=False)
    table = Path(os.environ["NEMORUN_HOME"]) / ".slurm_jobs"
    job = table.read_text().splitlines()[-1].partition("=")[0].strip()
    if request["tunnel"]:
        tunnel.run(f"echo {shlex.quote(job)} >> {shlex.quote(request['jobs'])}")
        tunnel.cleanup()
    return {"job": job}


def main() -> int:
    action, answer = sys.argv[1:]
    request = json.load(sys.stdin)
    actions = {"submit": submit, "dry-run": dry_run}
    try:
        write_json(Path(answer), actions[action](request))
    except OpdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
