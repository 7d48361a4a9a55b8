"""What the machine can do, measured in the same run: copy bandwidth and the head's matrix products.

Copy: the logits' size, read once and written once. Head: logits = h W^T, dh = dz W, dW = dz^T h in
bfloat16 at the run's T, V and H: what any method that starts at hidden states has to pay at least.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.measure import median_seconds


def _copy_seconds(logits_TV: torch.Tensor, case: Case) -> float:
    target_TV = torch.empty_like(logits_TV)
    return median_seconds(lambda: target_TV.copy_(logits_TV), case.device, case.max_repeats)


def run(case: Case) -> dict[str, Any]:
    device = torch.device(case.device)
    shape = (case.num_tokens, case.vocab_size)
    logits_TV = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    copy_s = _copy_seconds(logits_TV, case)
    hidden_TH = torch.randn(case.num_tokens, case.hidden_size, device=device).to(torch.bfloat16)
    weight_VH = torch.randn(case.vocab_size, case.hidden_size, device=device).to(torch.bfloat16)
    logits_TV.normal_()

    def products() -> None:
        torch.mm(hidden_TH, weight_VH.t(), out=logits_TV)
        torch.mm(logits_TV, weight_VH)
        torch.mm(logits_TV.t(), hidden_TH)

    products_s = median_seconds(products, case.device, max(1, case.max_repeats // 2))
    flops = 6 * case.num_tokens * case.vocab_size * case.hidden_size
    return {
        "copy_s": copy_s,
        "copy_bytes_per_s": 2 * case.logits_bytes / copy_s,
        "three_matmuls_s": products_s,
        "three_matmuls_flops_per_s": flops / products_s,
    }
