"""The learner: Megatron-Core forward, backward, optimizer, checkpoints and weight export.

The only package that imports `megatron.*`.

    learner     process entry under torchrun; the command loop
    commands    load, score, train, publish, save
    step        one step; `forward` runs micro-batches, `micro_loss` is the loss of one of them
    model       Hugging Face config -> TransformerConfig, layer spec, GPTModel
    hf          streamed weights in and out; `hf_names` is the one name table
    checkpoint  distributed checkpoints, also beside the training (`checkpoint_writer`); `optimizer_format` loads the
                state of the distributed optimizer without it, and the other way round; `checkpoint_errors` says whose
                fault a failure is
    layout      sizes of the parallel dimensions; `parallel` makes the process groups of them
    cpu_shim    CUDA literals of Megatron-Core on CPU; loaded for device "cpu" only
"""
