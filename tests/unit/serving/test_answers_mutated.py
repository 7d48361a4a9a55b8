"""100,000 mutated answers of a real server: every one is read or refused with a typed error, and none that breaks a
rule is accepted.

What no rule can see stays plausible (another digit of a log-prob, a version that is another number): such answers are
counted, and may differ from the recorded one in nothing but those values.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from mutations import STRUCTURAL, TEXTUAL, is_right, mutate

from opd_megatron.errors import ContractError, OpdError, RequestRefused, ServerError
from opd_megatron.serving.answers import Busy, Unanswered, read_answer
from opd_megatron.serving.contract import read_generations, read_scores

RECORDED = orjson.loads((Path(__file__).parent / "recorded_answers.json").read_bytes())
VOCAB: int = RECORDED["vocab_size"]
CASES = ("generate", "generate_topk", "score", "score_flat", "score_nested", "score_listed")
PARTS, MUTATIONS = 8, 100_000


def read(case: str, raw: bytes) -> list[Any]:
    """What the client does with a body."""
    request = RECORDED["answers"][case]["request"]
    answer = read_answer(200, "application/json", raw)
    if case.startswith("generate"):
        return read_generations(
            answer,
            rids=request["rid"],
            sent_as=request["rid"],
            prompts=request["input_ids"],
            vocab_size=VOCAB,
            max_new_tokens=request["sampling_params"]["max_new_tokens"],
            server="s",
            topk=request.get("top_logprobs_num", 0),
        )
    starts = request["logprob_start_len"]
    return read_scores(
        answer,
        sent_as=request["rid"],
        sequences=[
            (ids[: start + 1], ids[start + 1 :])
            for ids, start in zip(request["input_ids"], starts, strict=True)
        ],
        vocab_size=VOCAB,
        topk=request["top_logprobs_num"],
        listed=request.get("token_ids_logprob"),
    )


def raw_of(case: str) -> bytes:
    return orjson.dumps(RECORDED["answers"][case]["answer"])


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_answer_is_read_and_is_right_by_the_second_reading(case: str) -> None:
    assert len(read(case, raw_of(case))) == len(RECORDED["answers"][case]["request"]["input_ids"])
    assert is_right(raw_of(case), RECORDED["answers"][case]["request"], VOCAB)


def structure(results: list[Any]) -> list[Any]:
    """Of accepted results, what no plausible damage may change."""
    return [
        getattr(one, "token_ids", None) or (len(one.logprobs), one.topk_ids is None)
        for one in results
    ]


@pytest.mark.many
@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_mutated_answer_is_accepted_only_where_no_rule_is_broken(part: int) -> None:
    rng = random.Random(part)
    bodies = {case: raw_of(case) for case in CASES}
    structures = {case: structure(read(case, bodies[case])) for case in CASES}
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    slowest_s = 0.0
    for number in range(MUTATIONS // PARTS):
        case = CASES[number % len(CASES)]
        names, raw = mutate(bodies[case], rng)
        seen.update(names.split("+"))
        right = is_right(raw, RECORDED["answers"][case]["request"], VOCAB)
        began = time.perf_counter()
        try:
            results = read(case, raw)
        except (ContractError, ServerError):
            counts["refused"] += 1
            assert not right, (part, number, case, names, raw)
        else:
            counts["accepted"] += 1
            assert right, (part, number, case, names, raw)
            assert structure(results) == structures[case] or case.startswith("generate")
        slowest_s = max(slowest_s, time.perf_counter() - began)
    assert slowest_s < 5.0
    assert set(seen) == {change.__name__ for change in (*STRUCTURAL, *TEXTUAL)}
    assert counts["refused"] > counts["accepted"] > 0


def test_every_status_with_any_body_ends_in_a_typed_error() -> None:
    rng = random.Random(0)
    refusal = orjson.dumps(RECORDED["answers"]["refused"]["answer"])
    for status in 10 * [*range(100, 600)]:
        _, raw = mutate(rng.choice((refusal, raw_of("score"))), rng)
        kind = rng.choice(("application/json", "text/html", ""))
        later = rng.choice((None, "1", "-1", "x", "9" * 400, "Fri, 31 Dec 1999 23:59:59 GMT"))
        try:
            read_answer(status, kind, raw, later)
        except Busy as busy:
            assert status in (429, 503)
            assert 0.0 <= busy.after_s <= 60.0
        except Unanswered:
            assert status >= 500
        except RequestRefused:
            assert status in (400, 413, 422)
        except OpdError:
            assert status < 500
        else:
            assert status == 200
