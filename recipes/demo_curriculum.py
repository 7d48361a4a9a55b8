"""Two-digit addition, a curriculum: a hard switch over four tiny teachers, from a noisy one to the demo's own.

The first three are inside the learner and cost no server; they were trained with 7, 4.5 and 2.5 % of the digits
replaced (opd_megatron/demo/make_models.py). A teacher that does not teach at a step is not asked.
Measured once on two CPU cores: accuracy 87 % from 32 %, with a last teacher of 97 %, in 2.6 minutes. Other kinds of
teaching: docs/teachers.md.
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
