"""Two-digit addition, supervised: the demo's noisy student learns from written derivations, on two CPU cores.

The cold start before on-policy distillation, in small. Go on from it with
`opd export RUN --out DIR` and `opd run demo student.path=DIR`.
"""

from opd_megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    CorrectionConfig,
    DataConfig,
    EvaluationConfig,
    LearnerConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    ServerConfig,
    StudentConfig,
)

_SERVER = ServerConfig(
    context_length=64, max_total_tokens=16384, dtype="float32", request_timeout_s=60
)


def recipe() -> Recipe:
    return Recipe(
        device="cpu",
        steps=48,
        student=StudentConfig(path="demo/student"),
        data=DataConfig(
            train="demo/demonstrations.jsonl", heldout="demo/heldout.jsonl", max_prompt_tokens=12
        ),
        # Of the evaluation; the responses that train are in the data.
        rollout=RolloutConfig(max_new_tokens=20, server=_SERVER),
        objective=ObjectiveConfig(divergence="forward_kl", estimator="cross_entropy"),
        correction=CorrectionConfig(kind="none"),
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=4, min_lr=1e-5),
        batch=BatchConfig(prompts_per_step=64, rollouts_per_prompt=1, tokens_per_microbatch=4096),
        learner=LearnerConfig(tensor_parallel=2, precision="fp32"),
        evaluation=EvaluationConfig(grader="column_addition", every=24, problems=128),
        checkpoint=CheckpointConfig(every=24),
    )
