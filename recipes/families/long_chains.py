"""Students that write long chains of thought: responses of 16,384 tokens, small learning rates.

What "On-Policy Distillation" (Thinking Machines 2025), "Revisiting On-Policy Distillation" (arXiv 2603.25562) and
"Rethinking On-Policy Distillation" (arXiv 2604.13016) share; their recipes say what differs.
"""

from opd_megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LearnerConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    ServerConfig,
    StudentConfig,
    TeacherConfig,
)

PROMPT_TOKENS = 1024
RESPONSE_TOKENS = 16384
SERVER = ServerConfig(context_length=PROMPT_TOKENS + RESPONSE_TOKENS + 1, request_timeout_s=3600.0)


def long_chains(student: str, teacher: str, train: str) -> Recipe:
    """Models by their names on the Hugging Face hub; `train` below a folder of OPD_DATA."""
    return Recipe(
        steps=200,
        student=StudentConfig(path=student),
        teachers={"main": TeacherConfig(path=teacher, server=SERVER)},
        data=DataConfig(
            train=train,
            heldout="math-competitions/heldout.jsonl",
            max_prompt_tokens=PROMPT_TOKENS,
        ),
        rollout=RolloutConfig(max_new_tokens=RESPONSE_TOKENS, server=SERVER),
        optimizer=OptimizerConfig(lr=1e-6),
        batch=BatchConfig(prompts_per_step=64, rollouts_per_prompt=4, tokens_per_microbatch=17408),
        learner=LearnerConfig(distributed_optimizer=True, recompute=True, start_timeout_s=900.0),
        evaluation=EvaluationConfig(
            grader="math_verify", every=20, problems=220, samples_per_problem=8, temperature=0.7
        ),
        checkpoint=CheckpointConfig(every=20),
    )
