"""The reference setting: a Qwen3 Base student and an Instruct teacher on mathematics.

After "On-Policy Distillation Adventures" (Zhao 2026, https://andrewzh112.github.io/opd_adventures), Table 1:
DeepMath-103K, responses of at most 8,192 tokens, 128 prompts x 4 responses a step, learning rate 1e-5, sampled-token
reverse KL with masked importance weights (IcePop) in [0.5, 2.0]; evaluation at temperature 0.7 and top-p 0.9 with 8
responses a problem. 805 steps are one epoch. The published raw logs of that run show 2,048 responses a step and 201
steps an epoch: the variant `512prompts` follows the logs.

A Base student ends with another token than an Instruct teacher; the alias lets the two swap places in its scores.
"""

from dataclasses import replace

from opd_megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    CorrectionConfig,
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
RESPONSE_TOKENS = 8192
# One more than prompt and response: a server keeps a position free.
SERVER = ServerConfig(context_length=PROMPT_TOKENS + RESPONSE_TOKENS + 1, request_timeout_s=1800.0)
BASE_ENDS_AS_INSTRUCT = {"<|endoftext|>": "<|im_end|>"}


def instruct_teacher(path: str, num_servers: int) -> TeacherConfig:
    """One of several Instruct teachers of a Base student."""
    server = replace(SERVER, num_servers=num_servers)
    return TeacherConfig(path=path, aliases=BASE_ENDS_AS_INSTRUCT, server=server)


def base_from_instruct(student: str, teacher: str) -> Recipe:
    """Models by their names on the Hugging Face hub."""
    return Recipe(
        steps=805,
        student=StudentConfig(path=student),
        teachers={
            "main": TeacherConfig(path=teacher, aliases=BASE_ENDS_AS_INSTRUCT, server=SERVER)
        },
        data=DataConfig(
            train="deepmath-103k/train.parquet",
            heldout="math-competitions/heldout.jsonl",
            max_prompt_tokens=PROMPT_TOKENS,
        ),
        rollout=RolloutConfig(max_new_tokens=RESPONSE_TOKENS, server=SERVER),
        correction=CorrectionConfig(kind="masked", low=0.5, high=2.0),
        optimizer=OptimizerConfig(lr=1e-5, beta2=0.95, clip_grad=1.0),
        batch=BatchConfig(prompts_per_step=128, rollouts_per_prompt=4, tokens_per_microbatch=9216),
        learner=LearnerConfig(distributed_optimizer=True, recompute=True, start_timeout_s=900.0),
        evaluation=EvaluationConfig(
            grader="math_verify",
            every=40,
            problems=220,
            samples_per_problem=8,
            temperature=0.7,
            top_p=0.9,
        ),
        checkpoint=CheckpointConfig(every=40),
    )
