"""Hugging Face architecture -> TransformerConfig, layer spec and GPTModel of this pipeline stage.

One builder for both devices. CUDA uses Transformer Engine's layers and fusions, and its FP8; CPU
uses `cpu_layers` and no fusion. With a virtual pipeline a stage is several chunks, each a GPTModel
of its own. Weights are left uninitialised: a model is only used after `hf.load` or a checkpoint
filled it. The output head always computes in the precision of the weights, never in FP8.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.config.schema import LearnerConfig
from opd_megatron.errors import ConfigError
from opd_megatron.megatron.architecture import Architecture, check_layout
from opd_megatron.megatron.layout import layout_of
from opd_megatron.megatron.precision import fp8_settings

# Of weights and activations outside FP8 kernels.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}

# NVIDIA Apex's kernel that adds a weight gradient to the main gradient while it is computed.
_WGRAD_KERNEL = "fused_weight_gradient_mlp_cuda"

_CPU_SETTINGS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    # A gloo send still reads its buffer after the call returned.
    "deallocate_pipeline_outputs": False,
    "batch_p2p_sync": False,
}
_CUDA_SETTINGS: dict[str, Any] = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "apply_rope_fusion": True,
    "persist_layer_norm": True,
    "deallocate_pipeline_outputs": True,
}


def _pipeline_settings(learner: LearnerConfig) -> dict[str, Any]:
    """Batched sends for 1F1B. The interleaved schedule overlaps single sends with computation: two
    ranks exchange several chunks, and only the overlapped order keeps their messages apart."""
    if learner.virtual_pipeline == 1:
        return {"batch_p2p_comm": True}
    return {
        "virtual_pipeline_model_parallel_size": learner.virtual_pipeline,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _device_settings(device: str) -> dict[str, Any]:
    """Fusions and communication.

    Raises:
        ConfigError: device "cuda" without Transformer Engine.
    """
    if device == "cpu":
        return _CPU_SETTINGS
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError.of(
            "device", "cuda", "needs Transformer Engine", "install the `fp8` extra"
        )
    has_kernel = importlib.util.find_spec(_WGRAD_KERNEL) is not None
    return {**_CUDA_SETTINGS, "gradient_accumulation_fusion": has_kernel}


def transformer_config(
    arch: Architecture, learner: LearnerConfig, device: str
) -> TransformerConfig:
    """Megatron's configuration of the model.

    Raises:
        ConfigError: the layout or the FP8 layers do not fit the model, or device "cuda" without
            Transformer Engine.
    """
    check_layout(arch, learner)
    layout = layout_of(learner)
    dtype = DTYPES[learner.precision]
    recompute: dict[str, Any] = (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        if learner.recompute
        else {}
    )
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_size,
        ffn_hidden_size=arch.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.family.qkv_bias,
        qk_layernorm=arch.family.query_key_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=learner.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        # The loss function returns a sum; gradients are divided by the global token count.
        calculate_per_token_loss=True,
        **recompute,
        **fp8_settings(arch.num_layers, learner),
        **_pipeline_settings(learner),
        **_device_settings(device),
    )


def layer_spec(config: TransformerConfig, device: str, chunk: int | None = None) -> Any:
    """The modules of a block; `chunk` is the virtual stage, if there are several."""
    if device == "cuda":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    from opd_megatron.megatron.cpu_layers import CoreAttention, RMSNorm

    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    # A whole block, so that the final norm is ours too.
    final_norm: Any = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=final_norm
    )


def build_model(
    arch: Architecture, config: TransformerConfig, device: str, chunk: int | None = None
) -> GPTModel:
    """One chunk of this pipeline stage, on the device, with uninitialised weights."""
    where: dict[str, Any] = {"ignore_virtual": False, "vp_stage": chunk}
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, device, chunk),
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=1,  # only used by learned position embeddings
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,  # type: ignore[arg-type]
        rope_scaling=arch.rope_scaling is not None,
        rope_scaling_factor=arch.rope_scaling.factor if arch.rope_scaling else 8.0,
        vp_stage=chunk,
    )
    return model.to(config.params_dtype).to(torch.device(device))


def build_stage(
    arch: Architecture, config: TransformerConfig, learner: LearnerConfig, device: str
) -> list[GPTModel]:
    """All chunks of this pipeline stage, in the order in which a token meets them."""
    vpp = learner.virtual_pipeline
    chunks = [None] if vpp == 1 else range(vpp)
    return [build_model(arch, config, device, chunk) for chunk in chunks]


def wrap_data_parallel(
    modules: Sequence[GPTModel], config: TransformerConfig, learner: LearnerConfig
) -> list[DistributedDataParallel]:
    """Gradient buffers in float32, reduced over data- and context-parallel ranks.

    With `overlap_param_gather` parameters are whole only where a forward pass waited for them:
    call `gather_parameters` before anything else reads them.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=learner.distributed_optimizer,
        # Bad values are looked for once per step, on all ranks together.
        check_for_nan_in_grad=False,
        overlap_param_gather=learner.overlap_param_gather,
        # Megatron cuts the buffers into buckets only when gradients overlap too.
        overlap_grad_reduce=learner.overlap_param_gather,
    )
    config.finalize_model_grads_func = finalize_model_grads
    models = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    if learner.overlap_param_gather:
        # Gradients are reduced after the last micro-batch, not after each.
        until_last: Any = [model.no_sync for model in models]
        config.no_sync_func = until_last if len(models) > 1 else until_last[0]
    return models


def gather_parameters(models: Sequence[DistributedDataParallel]) -> None:
    """Make the parameters of every data-parallel rank whole after an optimizer step whose gather overlaps.

    Collective. The forward pass gathers on its own only after `zero_grad_buffer`, so without this a
    published, scored or saved model would be the old one but for this rank's shard.
    """
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
