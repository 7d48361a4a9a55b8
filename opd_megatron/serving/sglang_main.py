"""Process entry of one SGLang server.

    python -m opd_megatron.serving.sglang_main --keys-file F --device D --host H --port P
        [--parent-pid PID] -- ARGS

A thin start of the unmodified server that adds what SGLang has no flag for:

* keys come from a private file and are set on the parsed arguments, so no argument list shows them;
* on CPU the import stand-ins are installed, of SGLang's models only the one that is served is imported, and
  workers are forked instead of spawned: imports, which are most of a tiny server's start, are then paid
  once and their memory is shared;
* the server dies with its parent (PR_SET_PDEATHSIG; SGLang's own workers do so with this process);
* a port that is taken ends the process with one clear line, before anything is loaded;
* the rendezvous store of the workers listens on loopback only (SGLang's own would listen on every
  interface).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import logging
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_megatron.errors import EXIT_CONFIG, EXIT_RETRY, ConfigError
from opd_megatron.importing import without_collections
from opd_megatron.serving.keys import read_keys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None) -> None:
    """Ask the kernel for SIGKILL when the parent ends; leave at once if it already has."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        sys.exit(EXIT_RETRY)


def check_port_is_free(host: str, port: int) -> None:
    """End the process with EXIT_RETRY when nothing can be bound to the address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            print(f"sglang server: cannot bind {host}:{port}: {error.strerror}", file=sys.stderr)
            sys.exit(EXIT_RETRY)


def start_loopback_store() -> Any:
    """Start the workers' rendezvous store on a loopback port of the kernel's choice.

    torch's own store listens on every interface and takes no address, but accepts a listening
    socket. With `TORCHELASTIC_USE_AGENT_STORE` (torchrun's documented way) the workers connect to
    it instead of hosting one.

    Returns:
        The store, which must stay referenced as long as the server runs.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opd_megatron.serving.sglang_main")
    parser.add_argument("--keys-file", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, default=None)
    parser.add_argument("sglang", nargs=argparse.REMAINDER, help="-- then SGLang's own arguments")
    parsed = parser.parse_args(argv)
    if parsed.sglang[:1] == ["--"]:
        parsed.sglang = parsed.sglang[1:]
    return parsed


def import_only(model_path: Path) -> None:
    """Tell SGLang to import the module of one model instead of all of them.

    Its modules are named by `model_type` of `config.json`; of a model for which there is none, nothing is left out.
    """
    spec = importlib.util.find_spec("sglang")
    folder = Path(spec.origin or "").parent / "srt" / "models" if spec else Path()
    names = {module.name for module in pkgutil.iter_modules([str(folder)])}
    wanted = json.loads((model_path / "config.json").read_text()).get("model_type")
    if wanted in names:
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(names - {wanted}))


def prepare_cpu() -> None:
    """Install the import stand-ins and make SGLang fork its workers.

    SGLang forces the spawn method because CUDA does not survive a fork. On CPU a fork is safe here:
    it happens before any event loop, with one thread of this process's own and no OpenMP pool.
    """
    from opd_megatron.serving.cpu_shim import install

    install()
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None
    # One warning for each architecture that needs the absent kernels.
    logging.getLogger("sglang.srt.models.registry").setLevel(logging.ERROR)


def main(argv: Sequence[str]) -> None:
    parsed = _parse(argv)
    die_with_parent(parsed.parent_pid)
    keys = read_keys(parsed.keys_file)
    check_port_is_free(parsed.host, parsed.port)
    if parsed.device == "cpu":
        import_only(Path(parsed.sglang[parsed.sglang.index("--model-path") + 1]))
        prepare_cpu()
    store = start_loopback_store()
    with without_collections():
        # What `run_server` starts; its imports include all that the workers need.
        import sglang.srt.entrypoints.http_server  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from sglang.launch_server import run_server
        from sglang.srt.server_args import prepare_server_args

    address = ["--host", parsed.host, "--port", str(parsed.port), "--nccl-port", str(store.port)]
    arguments = prepare_server_args([*parsed.sglang, "--device", parsed.device, *address])
    arguments.api_key = keys.api
    arguments.admin_api_key = keys.admin

    # Without a warm-up request SGLang posts this to itself before its socket listens: harmless,
    # but it leaves a traceback in the log.
    logging.getLogger("sglang.srt.entrypoints.http_server").addFilter(
        lambda record: "post-warmup freeze_gc" not in record.getMessage()
    )
    try:
        run_server(arguments)
    finally:
        # When its HTTP server cannot start, SGLang leaves its workers running and waits for them.
        for worker in multiprocessing.active_children():
            worker.kill()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"sglang server: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
