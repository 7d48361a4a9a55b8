"""What travels between the stages: prompts, rollouts, teacher scores, samples.

Immutable. Shapes: `L` response tokens of one sample, `K` support entries. Log-probs are natural-log
float32, named by owner (behaviour policy, student, teacher). Response position `t` holds the log-prob of
response token `t` given everything before it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prompt:
    """One usable row of the data, encoded with the student's chat template.

    Example: `Prompt(id="add2-17", token_ids=(2, 8, 4, ...), text="40+85:", answer="125", teacher="main",
    source="train.jsonl:18")`. `response_ids`: of the given response, end token included, in supervised training.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    answer: str | None
    teacher: str | None
    source: str
    response_ids: tuple[int, ...] | None = None
    domain: str | None = None


def spread_versions(spans: tuple[tuple[int, int], ...]) -> NDArray[np.int32]:
    """[L] version of each token, of spans (version, end)."""
    counts = np.diff([0, *(end for _, end in spans)])
    return np.repeat(np.asarray([version for version, _ in spans], np.int32), counts)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response that a rollout server generated, or that the data gave (controller/given.py).

    The first `num_control` tokens of the prompt are for the student only (teaching.kind=control_token).
    `version_first`/`version_last` are the weight versions that produced the first and the last token; where they
    differ, `spans` says which version wrote which tokens: (version, end) of each stretch, e.g. `((3, 34), (4, 300))`
    for tokens 0-33 by version 3 and 34-299 by version 4. `behavior_logprobs` are those of the version that wrote the
    token. `finish_reason` is "stop" (an end token was sampled) or "length" (cut at max_new_tokens).
    `behavior_logprobs` are at the rollout temperature, before truncation; `kept_logmass` is the log of the probability
    that truncation (top-p, top-k, min-p) kept, so a token was drawn with `behavior_logprobs - kept_logmass`. None: all.

    A conversation is one response, too (controller/episodes.py): `given` are the stretches, (begin, end), that its
    environment wrote, whose behavior log-probs are 0 and mean nothing; `reward` is what the environment gave.

    Raises:
        ValueError: spans or stretches that do not fit the versions and the length, or a version that goes down.
    """

    sample_id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    behavior_logprobs: NDArray[np.float32]  # [L]
    finish_reason: str
    version_first: int
    version_last: int
    server: str
    num_control: int = 0
    topk_ids: NDArray[np.int32] | None = None  # [L, K] the student's likeliest tokens, when asked
    kept_logmass: NDArray[np.float32] | None = None  # [L]
    spans: tuple[tuple[int, int], ...] = ()
    given: tuple[tuple[int, int], ...] = ()
    reward: float | None = None

    def __post_init__(self) -> None:
        if not self.spans:
            fits = self.version_first == self.version_last
        else:
            versions, ends = zip(*self.spans, strict=True)
            fits = (versions[0], versions[-1]) == (self.version_first, self.version_last)
            fits = fits and ends[-1] == len(self.response_ids)
            fits = fits and all(a < b for a, b in itertools.pairwise((0, *ends)))
            fits = fits and all(a < b for a, b in itertools.pairwise(versions))
        borders = [border for stretch in self.given for border in stretch]
        fits = fits and all(a <= b for a, b in itertools.pairwise((0, *borders)))
        fits = fits and (not borders or borders[-1] <= len(self.response_ids))
        if not fits:
            raise ValueError(
                f"rollout {self.sample_id}: spans {self.spans} and given {self.given} for versions "
                f"{self.version_first} to {self.version_last} and {len(self.response_ids)} tokens"
            )

    @property
    def token_versions(self) -> NDArray[np.int32]:
        """[L] weight version that wrote each token; -1 where the environment did."""
        spans = self.spans or ((self.version_first, len(self.response_ids)),)
        versions = spread_versions(spans)
        versions[~self.sampled] = -1
        return versions

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """[L] False for tokens that the environment wrote."""
        mask = np.ones(len(self.response_ids), np.bool_)
        for begin, end in self.given:
            mask[begin:end] = False
        return mask

    @property
    def taught_prompt_ids(self) -> tuple[int, ...]:
        """The prompt as a teacher reads it."""
        return self.prompt_ids[self.num_control :]

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """A target's log-probs for one rollout: of the sampled tokens, and of its top-K when asked.

    `teacher` is the name of the target (`teacher/target.py`): a teacher, or a mean of some. The list is the top-K, or
    the tokens of a support that was asked for (-1 with log-prob -inf where there is none). Where servers could not
    say all: `left_out`, the probability of tokens that are missing in the list, and `error_nats` of the
    log-probs, both as upper bounds (`teacher/joint.py`).
    """

    teacher: str
    sampled_logprobs: NDArray[np.float32]  # [L]
    topk_ids: NDArray[np.int32] | None = None  # [L, K]
    topk_logprobs: NDArray[np.float32] | None = None  # [L, K]
    left_out: NDArray[np.float32] | None = None  # [L]
    error_nats: NDArray[np.float32] | None = None  # [L]
    server: str = ""  # of one teacher: the server that scored it


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout with its teacher scores: one unit of a step batch.

    `trainable` [L] bool is False for tokens that are masked for what they are (special tokens); None trains
    all. `reward` is the graded response, in [0, 1], when the recipe has a task term.
    """

    rollout: Rollout
    scores: TeacherScores
    trainable: NDArray[np.bool_] | None = None
    reward: float | None = None

    @property
    def group(self) -> str:
        """Samples of one prompt share it: the sample id without its number."""
        return self.rollout.sample_id.rpartition("#")[0]
