"""The contract with a real SGLang server on CPU: one tiny random Qwen3, one server for the file.

Tests run in file order: they change the server's weights, and the last one kills it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import subprocess
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from inside_learner import asked_twice
from prefix_reuse import cached_tokens
from record_answers import record
from sampling_identity import measured
from served_targets import check_targets
from tiny_servers import (
    VOCAB,
    RunningServer,
    make_model,
    of_ids,
    probe_logprobs,
    reference_logprobs,
    running,
)

from opd_megatron.config.schema import RolloutConfig
from opd_megatron.errors import EXIT_RETRY, ContractError, ServerError
from opd_megatron.serving.client import SglangClient
from opd_megatron.serving.keys import ServerKeys, new_keys
from opd_megatron.serving.pool import ServerPool
from opd_megatron.serving.requests import Sampling
from opd_megatron.teacher.scoring import score_rollouts
from opd_megatron.types import Rollout
from opd_megatron.weight_sync.route import Offer
from opd_megatron.weight_sync.verify import verify_weights

pytestmark = pytest.mark.real

PROMPTS = ((3, 4, 5, 6), (7, 8), (9,), (3, 4, 5, 10))
TOLERANCE_NATS = 1e-4


@dataclass(frozen=True)
class Fixture(RunningServer):
    """The server of this file, and the models it may be given."""

    models: dict[str, Path]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixture]:
    folder = tmp_path_factory.mktemp("sglang")
    models = {
        name: make_model(folder / name, seed) for seed, name in enumerate(("first", "second"))
    }
    limits = ("--max-running-requests", "4", "--max-queued-requests", "20")
    with running(folder, models["first"], 1, more_arguments=limits) as (started,):
        yield Fixture(**vars(started), models=models)


def call(server: Fixture, work: Any, **options: Any) -> Any:
    """Run `work(client)` in a fresh loop with a fresh client."""

    async def run() -> Any:
        arguments = {"keys": server.keys, "vocab_size": VOCAB, **options}
        async with SglangClient("rollout-0", server.url, **arguments) as client:
            outcome: Coroutine[Any, Any, Any] = work(client)
            return await outcome

    return asyncio.run(run())


def test_keys_are_in_no_argument_list_no_log_and_no_environment(server: Fixture) -> None:
    secrets = (server.keys.api, server.keys.admin)
    processes = server.processes()
    assert len(processes) >= 3  # launcher, scheduler, detokenizer
    for process in processes:
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        shown += Path(f"/proc/{process.pid}/environ").read_bytes()
        assert not any(secret.encode() in shown for secret in secrets), process
    log = server.log.read_text(errors="replace")
    assert not any(secret in log for secret in secrets)
    assert "Traceback" not in log


def test_every_listener_is_on_loopback(server: Fixture) -> None:
    listening = [
        connection.laddr
        for process in server.processes()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert server.port in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_taken_port_ends_the_process_with_a_clear_message(server: Fixture) -> None:
    started = time.monotonic()
    second = subprocess.run(
        server.command.argv,
        env={**os.environ, **server.command.env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == EXIT_RETRY
    assert f"cannot bind 127.0.0.1:{server.port}" in second.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generated_logprobs_are_at_the_rollout_temperature(
    server: Fixture, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, max_new_tokens=12)
    rids = [f"t{temperature}-{position}" for position in range(len(PROMPTS))]
    generations = call(server, lambda client: client.generate(PROMPTS, sampling, rids))
    assert [generation.rid for generation in generations] == rids
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        ids = prompt + generation.token_ids
        wanted_TV = reference_logprobs(server.models["first"], ids, temperature)
        wanted = of_ids(wanted_TV[len(prompt) - 1 :], generation.token_ids)
        assert np.abs(generation.logprobs - wanted).max() < TOLERANCE_NATS
        assert generation.version_first == generation.version_last == 7
        assert generation.finish_reason == ("stop" if generation.token_ids[-1] == 1 else "length")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.2])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_p": 0.9, "min_p": 0.05}], ids=str)
def test_a_student_equal_to_its_teacher_is_at_distance_zero_however_it_is_sampled(
    server: Fixture, tmp_path: Path, temperature: float, cut: dict[str, Any]
) -> None:
    top_k = VOCAB if cut else -1
    rollout = RolloutConfig(temperature=temperature, top_k=top_k, max_new_tokens=24, **cut)
    model = server.models["first"]
    seen = call(server, lambda client: measured(client, model, rollout, tmp_path))
    assert abs(seen.kl) <= 1e-3 and seen.gradient < 1e-3 and seen.num_tokens > 50
    assert seen.masked_frac == 0.0 and seen.num_outside == 0 and seen.kept_nats < 1e-3
    assert (seen.kept_mass < 0.99) == bool(cut)


def test_samples_of_one_group_differ_and_stop_tokens_stay(server: Fixture) -> None:
    stops = tuple(range(2, VOCAB, 2))
    sampling = Sampling(temperature=1.0, max_new_tokens=40, stop_token_ids=stops)
    rids = [f"stop-{position}" for position in range(8)]
    group = call(server, lambda client: client.generate([PROMPTS[0]] * 8, sampling, rids))
    assert len({generation.token_ids for generation in group}) > 1
    for generation in group:
        assert generation.finish_reason == "stop"
        assert generation.token_ids[-1] in {1, *stops}
        assert not set(generation.token_ids[:-1]) & {1, *stops}


def test_a_teacher_inside_the_learner_says_what_the_server_says(
    server: Fixture, tmp_path: Path
) -> None:
    models = server.models["second"], server.models["first"]
    seen = call(server, lambda client: asked_twice(client, PROMPTS, *models, tmp_path))
    assert seen.same_topk_ids and seen.num_tokens > 20 and seen.kl > 0.1
    assert max(seen.sampled_nats, seen.topk_nats) < 1e-3


def test_every_target_support_and_route_agrees_with_the_whole_vocabulary(server: Fixture) -> None:
    model = server.models["first"]
    seen = call(server, lambda client: check_targets(client, PROMPTS, model))
    print(seen)
    assert seen.num_tokens > 10 and seen.student_ids_differ == 0
    assert seen.exact_error < 1e-3 and seen.beyond_error < 1e-3
    assert seen.beyond_left_out < 1e-4 < seen.left_out


def test_scores_and_the_whole_distribution_equal_transformers(server: Fixture) -> None:
    pairs = [(prompt, tuple(range(11, 11 + 5 * n))) for n, prompt in enumerate(PROMPTS)]
    scores = call(server, lambda client: client.score(pairs, topk=VOCAB))
    for (prompt, response), score in zip(pairs, scores, strict=True):
        assert score.logprobs.shape == (len(response),)
        assert score.topk_logprobs.shape == (len(response), VOCAB)
        if not response:
            continue
        wanted_TV = reference_logprobs(server.models["first"], prompt + response)
        wanted_LV = wanted_TV[len(prompt) - 1 :]
        assert np.abs(score.logprobs - of_ids(wanted_LV, response)).max() < TOLERANCE_NATS
        whole_LV = np.take_along_axis(wanted_LV, score.topk_ids.astype(np.int64), axis=1)
        assert np.abs(score.topk_logprobs - whole_LV).max() < TOLERANCE_NATS
        assert (np.sort(score.topk_ids, axis=1) == np.arange(VOCAB)).all()
        assert (np.diff(score.topk_logprobs, axis=1) <= 0).all()


def test_teacher_scores_come_back_in_the_order_of_the_rollouts(server: Fixture) -> None:
    responses = [(20, 21), (22,), (), (23, 24, 25), (26,), (27, 28)]
    rollouts = [
        Rollout(
            f"s{n}", f"p{n % 3}", PROMPTS[n % 3], ids, np.zeros(len(ids), np.float32), "stop", 7, 7,
            "rollout-0",
        )
        for n, ids in enumerate(responses)
    ]  # fmt: skip

    async def score(client: SglangClient) -> Any:
        teachers = {
            name: ServerPool(name, [client], return_timeout_s=5, say=print)
            for name in ("main", "other")
        }
        for pool in teachers.values():
            pool.admit(client, 7)
        routes = ["main", "other"] * 3
        return await score_rollouts(teachers, rollouts, routes, topk=3, sequences_per_call=2)

    for position, scores in enumerate(call(server, score)):
        rollout = rollouts[position]
        assert scores.teacher == ("main", "other")[position % 2]
        assert scores.topk_ids.shape == (len(rollout.response_ids), 3)
        ids = rollout.prompt_ids + rollout.response_ids
        wanted_TV = reference_logprobs(server.models["first"], ids)[len(rollout.prompt_ids) - 1 :]
        wanted = of_ids(wanted_TV, rollout.response_ids)
        assert np.allclose(scores.sampled_logprobs, wanted, atol=TOLERANCE_NATS)


def test_a_group_computes_its_prompt_once(server: Fixture) -> None:
    prompt = tuple(2 + (position * position) % 47 for position in range(100))
    responses = [tuple(range(10 + n, 18 + n)) for n in range(8)]
    both = call(server, lambda client: cached_tokens(client, prompt, responses))
    # All but the last prompt token, whose distribution is asked for; the prompt alone has to compute it.
    assert [sorted(cached) for cached in both] == [[0, *[len(prompt) - 1] * 8]] * 2


def test_an_id_outside_the_vocabulary_is_refused_before_it_is_sent(server: Fixture) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=2)
    for ids in ((3, VOCAB), (3, -1)):
        with pytest.raises(ContractError, match="outside the vocabulary"):
            call(server, lambda client, ids=ids: client.generate([ids], sampling, ["bad"]))
        with pytest.raises(ContractError, match="outside the vocabulary"):
            call(server, lambda client, ids=ids: client.score([((3,), ids)]))
    assert call(server, lambda client: client.model_info()).weight_version == 7


def test_a_wrong_key_is_refused_and_the_normal_key_does_not_open_admin_routes(
    server: Fixture,
) -> None:
    strangers = new_keys()
    for work in (
        lambda client: client.wait_ready(5.0),
        lambda client: client.score([((3,), (4,))]),
        lambda client: client.flush_cache(),
    ):
        with pytest.raises(ServerError, match="status 401"):
            call(server, work, keys=strangers)
    normal_only = ServerKeys(server.keys.api, server.keys.api + "x")
    for work in (
        lambda client: client.weights.load_directory(server.models["second"], 8, 60.0),
        lambda client: client.flush_cache(),
        lambda client: client.abort_all(),
        lambda client: client.weight_checksums(),
    ):
        with pytest.raises(ServerError, match="status 401"):
            call(server, work, keys=normal_only)
    assert call(server, lambda client: client.model_info()).weight_version == 7


def test_a_request_that_cannot_fit_is_refused_without_a_retry(server: Fixture) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=200)
    with pytest.raises(ServerError, match=r"rollout-0 .*/generate: status 400"):
        call(server, lambda client: client.generate([(3,)], sampling, ["long"]))


def test_a_loaded_directory_changes_scores_and_version(server: Fixture) -> None:
    probes = (PROMPTS[0] + (11, 12, 13), PROMPTS[1] + (14, 15))
    offer = Offer(8, probes, probe_logprobs(server.models["second"], probes))

    async def load(client: SglangClient) -> float:
        await client.score([(PROMPTS[0], (11, 12))])  # leaves the old model's prefix in the cache
        before = await client.weight_checksums()
        await client.weights.load_directory(server.models["second"], 8, 60.0)
        assert await client.weight_checksums() != before
        return await verify_weights(client, offer, tolerance_nats=TOLERANCE_NATS)

    assert call(server, load) < TOLERANCE_NATS
    sampling = Sampling(temperature=1.0, max_new_tokens=4)
    (generation,) = call(server, lambda client: client.generate([(3, 4)], sampling, ["after"]))
    assert (generation.version_first, generation.version_last) == (8, 8)


def test_a_missing_directory_is_refused_and_the_old_weights_stay(server: Fixture) -> None:
    probes = (PROMPTS[0] + (11, 12, 13),)
    held = Offer(8, probes, probe_logprobs(server.models["second"], probes))
    absent = server.models["second"].with_name("absent")

    async def load(client: SglangClient) -> None:
        with pytest.raises(ServerError, match="status 400"):
            await client.weights.load_directory(absent, 10, 60.0)
        assert await verify_weights(client, held, tolerance_nats=1e-3) < TOLERANCE_NATS
        with pytest.raises(ServerError, match="reports weight version 8, not 10"):
            await verify_weights(client, dataclasses.replace(held, version=10), tolerance_nats=1e-3)

    call(server, load)


def test_a_server_that_is_full_gets_fewer_requests_at_once_and_answers_all(server: Fixture) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=8)

    async def flood(client: SglangClient) -> Any:
        return await asyncio.gather(
            *(client.generate([(3, 4)], sampling, [f"flood-{number}"]) for number in range(80))
        )

    # One try each: being told to come later costs none.
    answers = call(server, flood, max_retries=0)
    assert [answer.rid for (answer,) in answers] == [f"flood-{number}" for number in range(80)]


def test_the_recorded_answers_are_like_those_of_this_server(server: Fixture) -> None:
    folder = Path(__file__).parents[1] / "unit" / "serving"
    recorded = json.loads((folder / "recorded_answers.json").read_text())
    today = asyncio.run(record(server))
    assert recorded["answers"].keys() == today.keys()
    for name, one in recorded["answers"].items():
        assert one["request"] == today[name]["request"]
        assert fields_of(one["answer"]) == fields_of(today[name]["answer"]), name


# Fields that an answer has or lacks for how it ended and what was in the cache.
_CIRCUMSTANCES = ("matched", "length", "cached_tokens_details")


def fields_of(value: Any) -> Any:
    """Every path of keys in a decoded answer."""
    if isinstance(value, dict):
        return {k: fields_of(v) for k, v in value.items() if k not in _CIRCUMSTANCES}
    return fields_of(value[0]) if isinstance(value, list) and value else None


def test_abort_all_ends_running_requests_with_an_error(server: Fixture) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=120)

    async def abort(client: SglangClient) -> None:
        rids = [f"abort-{position}" for position in range(16)]
        running = asyncio.create_task(client.generate([(3, 4)] * 16, sampling, rids))
        await asyncio.sleep(0.1)
        await client.abort_all()
        with pytest.raises(ServerError, match="aborted"):
            await running

    call(server, abort)


def test_kill_9_of_the_launcher_leaves_no_process(server: Fixture) -> None:
    processes = server.processes()
    server.process.kill()
    server.process.wait(60)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(ServerError, match="gave up after 2 tries"):
        call(server, lambda client: client.model_info(), max_retries=1)
    with socket.create_server(("127.0.0.1", server.port)):
        pass
