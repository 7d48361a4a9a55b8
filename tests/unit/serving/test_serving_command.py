from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.schema import ServerConfig
from opd_megatron.serving.command import ServerCommand, server_command

CONFIG = ServerConfig(
    context_length=96,
    max_total_tokens=4096,
    dtype="float32",
    tensor_parallel=2,
    mem_fraction_static=0.25,
)


def build(device: str, **changes: Any) -> ServerCommand:
    arguments: dict[str, Any] = {
        "device": device,
        "model_path": Path("/models/student"),
        "port": 31000,
        "keys_file": Path("/run/keys.json"),
        "seed": 5,
    }
    return server_command(CONFIG, **{**arguments, **changes})


def option(command: ServerCommand, name: str) -> str:
    assert command.argv.count(name) == 1, f"{name} must appear once"
    return command.argv[command.argv.index(name) + 1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_configuration_reaches_the_arguments(device: str) -> None:
    command = build(device, weight_version=12)
    wanted = {
        "--model-path": "/models/student",
        "--port": "31000",
        "--host": "127.0.0.1",
        "--device": device,
        "--dtype": "float32",
        "--tp-size": "2",
        "--context-length": "96",
        "--max-total-tokens": "4096",
        "--mem-fraction-static": "0.25",
        "--random-seed": "5",
        "--weight-version": "12",
        "--keys-file": "/run/keys.json",
    }
    assert {name: option(command, name) for name in wanted} == wanted
    assert command.argv[1:3] == ("-m", "opd_megatron.serving.sglang_main")


def test_without_a_cache_size_the_server_decides() -> None:
    server = dataclasses.replace(CONFIG, max_total_tokens=0)
    command = server_command(
        server,
        device="cuda",
        model_path=Path("/models/student"),
        port=31000,
        keys_file=Path("/run/keys.json"),
        seed=5,
    )
    assert "--max-total-tokens" not in command.argv
    assert option(command, "--mem-fraction-static") == "0.25"


def test_log_probs_follow_the_rollout_temperature_on_every_device() -> None:
    for device in ("cpu", "cuda"):
        assert build(device).env["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"


def test_a_gpu_server_gets_no_cpu_setting() -> None:
    command = build("cuda")
    assert not {"torch_native", "pytorch", "--disable-overlap-schedule"} & set(command.argv)
    assert not {"SGLANG_USE_CPU_ENGINE", "OMP_NUM_THREADS"} & set(command.env)


def test_a_cpu_server_runs_native_torch_on_one_thread_and_sleeps_when_idle() -> None:
    command = build("cpu")
    assert option(command, "--attention-backend") == "torch_native"
    assert "--sleep-on-idle" in command.argv
    assert command.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert command.env["OMP_NUM_THREADS"] == "1"


def test_sglang_arguments_stand_behind_the_separator() -> None:
    argv = build("cpu", parent_pid=77).argv
    separator = argv.index("--")
    assert argv[argv.index("--parent-pid") + 1] == "77"
    for ours in ("--keys-file", "--device", "--host", "--port", "--parent-pid"):
        assert argv.index(ours) < separator < argv.index("--model-path")


def test_no_log_level_that_prints_the_arguments() -> None:
    assert option(build("cpu"), "--log-level") == "warning"


def test_worker_connections_stay_on_loopback_unless_the_server_is_reachable_from_outside() -> None:
    assert build("cpu").env["GLOO_SOCKET_IFNAME"] == "lo"
    outside = build("cuda", host="10.0.0.4")
    assert option(outside, "--host") == "10.0.0.4"
    assert "GLOO_SOCKET_IFNAME" not in outside.env
