"""The learner: Megatron-Core forward, backward, optimizer, checkpoints and weight export.

The only package that imports `megatron.*`.

    learner     process entry under torchrun; the command loop
    commands    load, score, train, publish, save
    step        one optimizer step; `forward` runs micro-batches, `reduction` makes values global
    model       Hugging Face config -> TransformerConfig, layer spec, GPTModel
    hf          streamed weights in and out; `hf_names` is the one name table
    checkpoint  distributed checkpoints
    cpu_shim    CUDA literals of Megatron-Core on CPU; loaded for device "cpu" only
"""
