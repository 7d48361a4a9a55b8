"""Two-digit addition on two CPU cores: models and data that come with the project (`recipes/demo/`).

What each recipe reached and took stands in its file: 1.4 to 2.3 GiB over all processes.
"""

from opd_megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LearnerConfig,
    ObserveConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    ServerConfig,
    StudentConfig,
    TeacherConfig,
)

SERVER = ServerConfig(
    context_length=64, max_total_tokens=16384, dtype="float32", request_timeout_s=60
)


def addition() -> Recipe:
    """Sampled-token reverse KL, 60 steps of 64 prompts x 4 responses."""
    return Recipe(
        device="cpu",
        steps=60,
        student=StudentConfig(path="demo/student"),
        teachers={"main": TeacherConfig(path="demo/teacher", server=SERVER)},
        data=DataConfig(
            train="demo/train.jsonl", heldout="demo/heldout.jsonl", max_prompt_tokens=12
        ),
        rollout=RolloutConfig(max_new_tokens=20, server=SERVER),
        optimizer=OptimizerConfig(lr=1e-3),
        batch=BatchConfig(prompts_per_step=64, rollouts_per_prompt=4, tokens_per_microbatch=4096),
        learner=LearnerConfig(tensor_parallel=2, precision="fp32"),
        evaluation=EvaluationConfig(
            grader="column_addition", every=20, problems=128, kl_problems=32
        ),
        checkpoint=CheckpointConfig(every=20),
        observe=ObserveConfig(show_rollout_every=20),
    )
