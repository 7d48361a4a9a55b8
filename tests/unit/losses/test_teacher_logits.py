"""A teacher's scores from its logits: any ids, any support, ids that change places. Shards: the real teacher tests."""

from __future__ import annotations

import math

import pytest
import torch
from enumeration import loss_of

from opd_megatron.config.schema import SUPPORTS, CorrectionConfig, ObjectiveConfig
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.fused.dense import dense_stats
from opd_megatron.losses.supports import SupportSources, make_support
from opd_megatron.losses.teacher_logits import LocalLogits, support_of_logits, swap_columns
from opd_megatron.losses.token_loss import SupportInputs, TokenInputs
from opd_megatron.losses.token_stats import token_stats

T, V, REAL, K = 7, 16, 13, 4


def logits_and_ids() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher logits with mass in the padding, which must not count; sampled ids; the student's top-K."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(T, V, generator=generator, dtype=torch.float64) * 2
    logits[:, REAL:] = 50.0
    sampled = torch.randint(0, REAL, (T,), generator=generator)
    student = torch.stack([torch.randperm(REAL, generator=generator)[:K] for _ in range(T)])
    return logits, sampled, student


@pytest.mark.parametrize("name", [name for name in SUPPORTS if name != "full"])
def test_the_teacher_is_exact_at_the_ids_of_every_support(name: str) -> None:
    logits, sampled, student = logits_and_ids()
    teacher = LocalLogits(logits, REAL)
    log_q = logits[:, :REAL].log_softmax(-1)
    support, inputs, topk_ids = support_of_logits(
        name, teacher, topk=K, sampled_ids_T=sampled, student_ids_TK=student
    )
    assert torch.equal(topk_ids, log_q.topk(K).indices)
    sources = SupportSources(REAL, topk_ids, student, sampled)
    wanted = make_support(name, sources)
    assert torch.equal(support.ids_TJ, wanted.ids_TJ)
    assert torch.equal(inputs.valid_TJ, wanted.valid_TJ)
    torch.testing.assert_close(inputs.teacher_logprobs_TJ, log_q.gather(1, support.ids_TJ))
    assert bool(support.valid_TJ.any())


def test_a_topk_beyond_the_vocabulary_is_the_vocabulary() -> None:
    logits, _, _ = logits_and_ids()
    ids = LocalLogits(logits, REAL).topk(1000)
    assert ids.shape == (T, REAL)
    assert torch.equal(ids.sort(1).values, torch.arange(REAL).expand(T, -1))


def test_pairs_of_ids_change_places_and_nothing_else_does() -> None:
    logits, _, _ = logits_and_ids()
    logits[2, 5] = -math.inf
    swapped = logits.clone()
    swaps = {0: 5, 5: 0, 3: 12, 12: 3}
    swap_columns(swapped, swaps, vocab_size=REAL)
    columns = [swaps.get(i, i) for i in range(V)]
    assert torch.equal(swapped, logits[:, columns])
    swap_columns(swapped, swaps, vocab_size=REAL)
    assert torch.equal(swapped, logits)


@pytest.mark.parametrize("measure", ["tail_bucket", "renormalized"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "total_variation"])
def test_the_whole_vocabulary_unlisted_is_the_listed_one(divergence: str, measure: str) -> None:
    teacher, sampled, _ = logits_and_ids()
    generator = torch.Generator().manual_seed(9)
    student = torch.randn(T, V, generator=generator, dtype=torch.float64)
    objective = ObjectiveConfig(
        divergence=divergence, estimator="support_matching", support="full", measure=measure
    )
    loss = loss_of(objective, CorrectionConfig(kind="none"))
    log_q = teacher[:, :REAL].log_softmax(-1)
    mask = torch.arange(T) != 2
    everything = torch.arange(REAL).expand(T, -1)

    def inputs() -> TokenInputs:
        q_T = log_q.gather(1, sampled[:, None])[:, 0]
        valid = torch.ones_like(everything, dtype=torch.bool)
        return TokenInputs(q_T, q_T, mask, support=SupportInputs(log_q, valid))

    listed = student.clone().requires_grad_()
    stats = token_stats(listed, sampled, support_ids_TJ=everything, vocab_size=REAL)
    wanted = loss(stats, inputs())
    wanted.loss_sum.backward()
    unlisted = student.clone().requires_grad_()
    dense = dense_stats(unlisted, teacher, sampled, make_divergence(objective), vocab_size=REAL)
    seen = loss(
        dense.student,
        TokenInputs(
            inputs().behavior_logprobs_T,
            inputs().teacher_logprobs_T,
            mask,
            divergence_T=dense.divergence_T,
        ),
    )
    seen.loss_sum.backward()
    torch.testing.assert_close(seen.losses_T, wanted.losses_T, rtol=1e-9, atol=1e-9)
    assert listed.grad is not None and unlisted.grad is not None
    torch.testing.assert_close(unlisted.grad, listed.grad, rtol=1e-9, atol=1e-9)
    assert seen.extras["support_teacher_mass"].tolist() == mask.double().tolist()
