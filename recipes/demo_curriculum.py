"""Two-digit addition, a curriculum: a hard switch over four tiny teachers, from a noisy one to the demo's own.

Shows: teachers of which one teaches at a time; one that does not teach at a step is not asked. The first three are
inside the learner and cost no server; they were trained with 7, 4.5 and 2.5 % of the digits replaced
(opd_megatron/demo/make_models.py).
Source: "On-Policy Distillation Adventures" switches 4B, 8B, 14B, 32B. Other kinds of teaching: docs/teachers.md.
Expected: accuracy 31.6 % to 88.7 % (teacher 96.6 %), KL(student || teacher) 0.742 to 0.059 nats a token.
Memory: 2.2 GiB over all processes, measured once.
Speed: 0.99 s a step, 86 s in all, measured once on two CPU cores.
Look at: teacher/share/early and those of the others; train/kl_reverse jumps where the teacher changes.
Run: `opd run demo_curriculum`
"""

from opd_megatron.config.overrides import change
from opd_megatron.config.schema import Recipe
from recipes.families.demo import addition


def recipe() -> Recipe:
    return change(
        addition(),
        {
            "teachers.early.path": "demo/teacher_early",
            "teachers.early.engine": "in_process",
            "teachers.middle.path": "demo/teacher_middle",
            "teachers.middle.engine": "in_process",
            "teachers.late.path": "demo/teacher_late",
            "teachers.late.engine": "in_process",
            "teaching.kind": "hard_switch",
            "teaching.starts.early": 0.0,
            "teaching.starts.middle": 0.2,
            "teaching.starts.late": 0.4,
            "teaching.starts.main": 0.6,
        },
    )
