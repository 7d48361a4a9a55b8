"""The command that starts one SGLang server: arguments and environment, without side effects.

    python -m opd_megatron.serving.sglang_main --keys-file F --device D --host H --port P
        [--parent-pid PID] -- ARGS

Sampling semantics that every server of a run shares, set here and nowhere else:

* `SGLANG_RETURN_ORIGINAL_LOGPROB=0`: log-probs of *generated* tokens are those of the
  temperature-scaled distribution (before top-p and top-k), that is, of the behavior policy at the
  rollout temperature.
* Log-probs of *prompt* tokens are always at temperature 1 in SGLang, so scoring needs no setting.

The tokenizer stays unloaded (`--skip-tokenizer-init`): ids go in and ids come out, detokenizing is
our own business. The log level is `warning` because at `info` SGLang prints its arguments, keys
included.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config.schema import ServerConfig

LOOPBACK = "127.0.0.1"

# Native torch kernels only, and none of the machinery that exists for GPUs.
_CPU_ARGUMENTS = (
    "--attention-backend", "torch_native",
    "--sampling-backend", "pytorch",
    "--cuda-graph-backend-decode", "disabled",
    "--cuda-graph-backend-prefill", "disabled",
    "--disable-overlap-schedule",
    # An idle scheduler polls without pause otherwise, which takes a core from the learner.
    "--sleep-on-idle",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """What to start. `env` holds only what must be added to the inherited environment."""

    argv: tuple[str, ...]
    env: dict[str, str]


def server_command(
    server: ServerConfig,
    *,
    device: str,
    model_path: Path,
    port: int,
    keys_file: Path,
    seed: int,
    weight_version: int = 0,
    host: str = LOOPBACK,
    parent_pid: int | None = None,
    python: str = sys.executable,
) -> ServerCommand:
    """Build the command of one server.

    Args:
        device: "cpu" or "cuda".
        model_path: Hugging Face directory whose weights are loaded at start.
        port: a port that is free now; the server ends with an error if it is not when it binds.
        keys_file: written by `keys.write_keys`.
        seed: SGLang's random seed. On CPU it makes no promise: batching decides the order of draws.
        weight_version: label of the weights at `model_path`.
        host: address to bind; loopback unless other machines must reach the server.
        parent_pid: the process whose death ends the server; None leaves only the kernel's own
            signal.
    """
    argv = [python, "-m", "opd_megatron.serving.sglang_main"]
    argv += ["--keys-file", str(keys_file), "--device", device]
    argv += ["--host", host, "--port", str(port)]
    if parent_pid is not None:
        argv += ["--parent-pid", str(parent_pid)]
    argv += ["--", *_sglang_arguments(server, device, model_path, seed, weight_version)]
    return ServerCommand(tuple(argv), _environment(device, host))


def _sglang_arguments(
    server: ServerConfig,
    device: str,
    model_path: Path,
    seed: int,
    weight_version: int,
) -> list[str]:
    arguments = {
        "--model-path": str(model_path),
        "--dtype": server.dtype,
        "--tp-size": str(server.tensor_parallel),
        "--context-length": str(server.context_length),
        "--mem-fraction-static": str(server.mem_fraction_static),
        "--random-seed": str(seed),
        "--weight-version": str(weight_version),
        "--grammar-backend": "none",
        "--log-level": "warning",
    }
    if server.max_total_tokens > 0:
        arguments["--max-total-tokens"] = str(server.max_total_tokens)
    argv = [part for pair in arguments.items() for part in pair]
    argv += ["--skip-tokenizer-init", "--skip-server-warmup"]
    return [*argv, *_CPU_ARGUMENTS] if device == "cpu" else argv


def _environment(device: str, host: str) -> dict[str, str]:
    env = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",
        # /health generates a token by default, which would wait behind a long batch.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }
    if device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        env["OMP_NUM_THREADS"] = "1"
        # Quantized formats announce at import that they need a GPU; nobody asked for them.
        env["PYTHONWARNINGS"] = "ignore::UserWarning"
    if host == LOOPBACK:
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env
