"""The methods: where each one's code comes from, what it starts at, what it gives.

Families, by what a method starts at:

    logits       bfloat16 student logits [T, V], stored
    head         hidden states and output weight; the head's matrix products are part of the method
    dense        student and teacher logits, stored: KL(student || teacher) over the vocabulary
    dense_head   hidden states and output weight of student and teacher, the same divergence

Terms are those of benchmarks/objective.py. `function` names `module:function` under
benchmarks/methods; it is imported in the worker only, because a peer imports from its own
environment. Peers run as their packages ship them, with their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

KL, SAMPLED, ENTROPY, DENSE = "kl", "sampled", "entropy", "dense"
LOGITS, HEAD, DENSE_LOGITS, DENSE_HEAD = "logits", "head", "dense", "dense_head"
FAMILIES = (LOGITS, HEAD, DENSE_LOGITS, DENSE_HEAD)
OURS, BASELINE, PEER = "ours", "baseline", "peer"

_OPD = (KL, SAMPLED, ENTROPY)
_CPU, _CUDA = ("cpu",), ("cuda",)
_BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Method:
    """One line of the tables.

    Attributes:
        gives: the outputs in words, for the table.
        terms: the terms of the loss that its outputs allow; equal terms are comparable.
        sweeps_topk: measured at every K of the case, not only at the main one.
        overwrites: it destroys its logits, which are restored between calls, outside the clock.
        weight_grad: the weight's gradient is returned (heads), not added to a buffer of the model.
        package: name on the package index, for the version; "" for code in this repository.
    """

    name: str
    family: str
    function: str
    gives: str
    terms: tuple[str, ...]
    kind: str = PEER
    devices: tuple[str, ...] = _BOTH
    sweeps_topk: bool = False
    overwrites: bool = False
    package: str = ""
    weight_grad: bool = True


_STATS = "log-probs of target and K ids, entropy, log Z"
_LOSS = "forward KL on K ids (a scalar), log-prob, entropy"
_DENSE = "reverse KL"


def _ours(
    name: str,
    family: str,
    function: str,
    *,
    devices: tuple[str, ...] = _BOTH,
    sweeps_topk: bool = False,
    overwrites: bool = False,
    weight_grad: bool = True,
) -> Method:
    is_dense = family in (DENSE_LOGITS, DENSE_HEAD)
    return Method(
        name,
        family,
        function,
        f"{_DENSE}, {_STATS}" if is_dense else _STATS,
        (DENSE,) if is_dense else _OPD,
        OURS,
        devices,
        sweeps_topk,
        overwrites,
        weight_grad=weight_grad,
    )


def _baseline(name: str, family: str, function: str, gives: str) -> Method:
    terms = (DENSE,) if family in (DENSE_LOGITS, DENSE_HEAD) else _OPD
    return Method(name, family, f"baseline:{function}", gives, terms, BASELINE)


METHODS = (
    _ours("ours torch", LOGITS, "ours:stored_torch"),
    _ours("ours torch in place", LOGITS, "ours:in_place_torch", overwrites=True),
    _ours("ours compiled", LOGITS, "ours:stored_compiled", devices=_CPU, sweeps_topk=True),
    _ours(
        "ours compiled in place",
        LOGITS,
        "ours:in_place_compiled",
        devices=_CPU,
        sweeps_topk=True,
        overwrites=True,
    ),
    _ours("ours triton", LOGITS, "ours:stored_triton", devices=_CUDA, sweeps_topk=True),
    _ours(
        "ours triton in place",
        LOGITS,
        "ours:in_place_triton",
        devices=_CUDA,
        sweeps_topk=True,
        overwrites=True,
    ),
    _baseline("naive", LOGITS, "naive", "log-probs of target and K ids, entropy"),
    _baseline(
        "naive, checkpointed", LOGITS, "checkpointed", "log-probs of target and K ids, entropy"
    ),
    Method(
        "TRL selective_log_softmax + entropy_from_logits",
        LOGITS,
        "peer_trl:selective",
        "log-probs of target and K ids, entropy; bfloat16",
        _OPD,
        sweeps_topk=True,
        package="trl",
    ),
    Method(
        "verl FSDP top-K + entropy + log-prob",
        LOGITS,
        "peer_verl:fsdp",
        f"{_LOSS}; bfloat16",
        _OPD,
        package="verl",
    ),
    Method(
        "verl FSDP top-K, chunked, + entropy + log-prob",
        LOGITS,
        "peer_verl:fsdp_chunked",
        f"{_LOSS}; bfloat16",
        _OPD,
        package="verl",
    ),
    Method(
        "verl FSDP top-K only",
        LOGITS,
        "peer_verl:fsdp_topk_only",
        "forward KL on K ids (a scalar); bfloat16",
        (KL,),
        package="verl",
    ),
    Method(
        "verl FSDP entropy + log-prob",
        LOGITS,
        "peer_verl:fsdp_logprob_entropy",
        "log-prob, entropy; bfloat16",
        (SAMPLED, ENTROPY),
        package="verl",
    ),
    Method(
        "verl Megatron top-K + entropy + log-prob",
        LOGITS,
        "peer_verl:megatron",
        _LOSS,
        _OPD,
        # Its entropy shifts the logits in backward and shifts them back, with bfloat16's rounding.
        overwrites=True,
        package="verl",
    ),
    Method(
        "Megatron vocab_parallel_cross_entropy",
        LOGITS,
        "peer_megatron:cross_entropy",
        "log-prob",
        (SAMPLED,),
        package="megatron-core",
    ),
    _ours("ours chunked, gradient in forward", HEAD, "ours_fused:chunked"),
    _ours(
        "ours chunked, into main_grad", HEAD, "ours_fused:chunked_into_main_grad", weight_grad=False
    ),
    _ours("ours recompute", HEAD, "ours_fused:recompute"),
    _baseline("naive", HEAD, "naive_head", "log-probs of target and K ids, entropy"),
    Method(
        "TRL ChunkedLogProbFunction",
        HEAD,
        "peer_trl:chunked_logprob",
        "log-prob, entropy",
        (SAMPLED, ENTROPY),
        package="trl",
    ),
    _ours("ours dense", DENSE_LOGITS, "ours_fused:dense"),
    _ours("ours dense in place", DENSE_LOGITS, "ours_fused:dense_in_place", overwrites=True),
    _baseline("naive", DENSE_LOGITS, "naive_dense", _DENSE),
    Method(
        "TRL GKD generalized_jsd_loss",
        DENSE_LOGITS,
        "peer_trl:gkd",
        f"{_DENSE}; bfloat16",
        (DENSE,),
        package="trl",
    ),
    Method(
        "torchtune ReverseKLWithChunkedOutputLoss",
        DENSE_LOGITS,
        "peer_torchtune:reverse_kl",
        _DENSE,
        (DENSE,),
        package="torchtune",
    ),
    _ours("ours logits by matmul, dense in place", DENSE_HEAD, "ours_fused:dense_head"),
    _ours("ours chunked, gradient in forward", DENSE_HEAD, "ours_fused:dense_chunked"),
    _ours(
        "ours chunked, into main_grad",
        DENSE_HEAD,
        "ours_fused:dense_chunked_into_main_grad",
        weight_grad=False,
    ),
    _baseline("naive", DENSE_HEAD, "naive_dense_head", _DENSE),
    Method(
        "TRL ChunkedDivergenceFunction",
        DENSE_HEAD,
        "peer_trl:chunked_divergence",
        f"{_DENSE}, entropy without gradient",
        (DENSE,),
        package="trl",
    ),
    Method(
        "Liger LigerFusedLinearJSDLoss",
        DENSE_HEAD,
        "peer_liger:jsd",
        f"{_DENSE}; bfloat16",
        (DENSE,),
        package="liger-kernel",
    ),
    Method(
        "Liger LigerFusedLinearJSDLoss, in eighths",
        DENSE_HEAD,
        "peer_liger:jsd_in_eighths",
        f"{_DENSE}; bfloat16",
        (DENSE,),
        package="liger-kernel",
    ),
)


def methods_for(device: str) -> tuple[Method, ...]:
    return tuple(method for method in METHODS if device in method.devices)


def method_id(method: Method) -> str:
    return f"{method.family}/{method.name}"


def find(identifier: str) -> Method:
    for method in METHODS:
        if method_id(method) == identifier:
            return method
    raise KeyError(f"{identifier}: no such method; see benchmarks/catalog.py")
