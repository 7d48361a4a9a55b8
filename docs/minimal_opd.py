"""On-policy distillation in one file: what the distributed system computes, on two models.

    python docs/minimal_opd.py --steps 2 --student DIR --teacher DIR

One step: the student samples responses, the teacher scores every token of them, and the student's
parameters follow the gradient of

    loss = - 1/N sum_t w_t A_t log pi(y_t)        N = number of response tokens in the step

    A_t = log q(y_t) - log pi(y_t)                advantage, a constant: k1, discount 0
    w_t = r_t if low <= r_t <= high else 0        masked importance weight (IcePop), a constant
    r_t = pi(y_t) / mu(y_t)                       learner over behavior policy, same weights

pi is the student as the learner computes it, mu the student as the sampler computed it, q the
teacher. On average over y_t ~ pi the gradient is that of KL(pi || q), the reverse KL: student
against teacher. Here pi and mu come from one engine and r is 1 up to rounding; with SGLang and
Megatron they differ, and w matters.

Everything is at temperature 1. Left out, and found in `opd_megatron/`: servers, parallelism,
packing, checkpoints, evaluation, other objectives.

Suffixes: N rollouts of a batch, L response tokens (padded on the right), V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = Path(__file__).parents[1] / "recipes" / "demo" / "train.jsonl"


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with the log-probs that its tokens had when they were drawn."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]


@torch.no_grad()
def sample(
    student: Any,
    prompt_ids: Sequence[int],
    num_rollouts: int,
    max_new_tokens: int,
    eos_id: int,
    generator: torch.Generator,
) -> list[Rollout]:
    """Draw `num_rollouts` responses to one prompt. The end token is part of a response."""
    ids = torch.tensor([list(prompt_ids)] * num_rollouts)
    cache, tokens, logprobs = None, [], []
    ended = torch.zeros(num_rollouts, dtype=torch.bool)
    for _ in range(max_new_tokens):
        output = student(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logprobs_NV = output.logits[:, -1].float().log_softmax(-1)
        ids = torch.multinomial(logprobs_NV.exp(), 1, generator=generator)
        tokens.append(ids[:, 0])
        logprobs.append(logprobs_NV.gather(1, ids)[:, 0])
        ended |= ids[:, 0] == eos_id
        if bool(ended.all()):
            break
    rollouts = []
    for row_ids, row_logprobs in zip(
        torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True
    ):
        length = row_ids.index(eos_id) + 1 if eos_id in row_ids else len(row_ids)
        rollouts.append(
            Rollout(tuple(prompt_ids), tuple(row_ids[:length]), tuple(row_logprobs[:length]))
        )
    return rollouts


def response_logits(model: Any, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Logits that predict the response tokens, one row after the other: [sum of L, V] float32.

    The logits at position t predict token t + 1, so the response of P prompt and L response tokens
    is predicted at positions P - 1 ... P + L - 2. A causal model can not see padding on the right.
    """
    rows = [torch.tensor(r.prompt_ids + r.response_ids) for r in rollouts]
    logits = model(input_ids=pad_sequence(rows, batch_first=True), use_cache=False).logits.float()
    parts = []
    for row, rollout in zip(logits, rollouts, strict=True):
        first = len(rollout.prompt_ids) - 1
        parts.append(row[first : first + len(rollout.response_ids)])
    return torch.cat(parts)


def response_logprobs(model: Any, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Log-probs of the response tokens, one rollout after the other: [sum of L]."""
    targets = torch.tensor([token for r in rollouts for token in r.response_ids])
    logprobs = response_logits(model, rollouts).log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0]


def opd_loss(
    student_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    low: float = 0.5,
    high: float = 2.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the module docstring, a mean over all given tokens, and what it was made of."""
    advantages = (teacher_logprobs - student_logprobs).detach()
    ratio = (student_logprobs - behavior_logprobs).detach().exp()
    weights = torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
    loss = -(weights * advantages * student_logprobs).mean()
    return loss, {"advantages": advantages, "weights": weights}


def train_step(
    student: Any, teacher: Any, optimizer: Any, rollouts: Sequence[Rollout]
) -> dict[str, float]:
    """Score, differentiate, clip, update. Returns loss, KL estimate, gradient norm and lengths."""
    behavior = torch.tensor([x for r in rollouts for x in r.behavior_logprobs])
    with torch.no_grad():
        teacher_logprobs = response_logprobs(teacher, rollouts)
    student_logprobs = response_logprobs(student, rollouts)
    loss, parts = opd_loss(student_logprobs, teacher_logprobs, behavior)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return {
        "loss": loss.item(),
        "kl": -parts["advantages"].mean().item(),
        "grad_norm": grad_norm.item(),
        "masked": (parts["weights"] == 0).float().mean().item(),
        "length": len(behavior) / len(rollouts),
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the loop and print one line a step."""
    parser = argparse.ArgumentParser(description="On-policy distillation on two models.")
    parser.add_argument("--student", required=True, help="Hugging Face model directory")
    parser.add_argument("--teacher", required=True, help="Hugging Face model directory")
    parser.add_argument("--prompts", default=str(PROMPTS), help="JSONL with a 'prompt' per line")
    parser.add_argument("--out", help="where to save the trained student")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--rollouts-per-prompt", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.student)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    prompts = [json.loads(row)["prompt"] for row in Path(options.prompts).read_text().splitlines()]
    shuffle, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    history = []
    for step in range(1, options.steps + 1):
        rollouts = []
        for prompt in shuffle.sample(prompts, options.prompts_per_step):
            prompt_ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            rollouts += sample(
                student,
                prompt_ids,
                options.rollouts_per_prompt,
                options.max_new_tokens,
                tokenizer.eos_token_id,
                generator,
            )
        row = train_step(student, teacher, optimizer, rollouts)
        history.append(row)
        print(f"step {step}/{options.steps} " + " ".join(f"{k} {v:.4f}" for k, v in row.items()))
    if options.out:
        student.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    return history


if __name__ == "__main__":
    main()
