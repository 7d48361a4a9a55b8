"""Student, teachers and recipe agree before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opd_megatron.config.overrides import apply_overrides
from opd_megatron.config.recipes import load_recipe
from opd_megatron.config.rules import problems
from opd_megatron.config.schema import Recipe
from opd_megatron.data.chat import load_chat_tokenizer
from opd_megatron.errors import ConfigError
from opd_megatron.launch.preflight import check_inputs


@pytest.fixture(scope="module")
def demo() -> Recipe:
    return load_recipe("demo")[0]


def test_a_teacher_with_the_students_weights_is_refused_unless_it_is_meant(
    demo: Recipe, tmp_path: Path
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(demo.student.path, copied)
    for path in (demo.student.path, copied):
        same = apply_overrides(demo, [f"teachers.main.path={path}"])
        with pytest.raises(ConfigError, match="holds the student's own weights"):
            check_inputs(same)
        check_inputs(apply_overrides(same, ["teachers.main.may_equal_student=true"]))
    weights = copied / "model.safetensors"
    content = weights.read_bytes()
    for place in (len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        weights.write_bytes(changed)
        check_inputs(apply_overrides(demo, [f"teachers.main.path={copied}"]))


def test_a_known_difference_is_accepted_by_its_name(demo: Recipe, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(demo.teachers["main"].path, teacher)
    path = teacher / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": config["chat_template"] + " "}))
    other = apply_overrides(demo, [f"teachers.main.path={teacher}"])
    check_inputs(other)  # white space at the end is no template
    path.write_text(json.dumps(config | {"chat_template": config["chat_template"] + "x"}))
    with pytest.raises(ConfigError, match=r"set teachers\.main\.accept=\[chat_template\]"):
        check_inputs(other)
    check_inputs(apply_overrides(other, ["teachers.main.accept=[chat_template]"]))
    (wrong,) = problems(apply_overrides(other, ["teachers.main.accept=[chat_templat]"]))
    assert "did you mean 'chat_template'" in wrong


def test_a_thinking_mode_needs_a_template_with_a_switch(demo: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.thinking='always': the student's chat template has no"
    ):
        check_inputs(apply_overrides(demo, ["data.thinking=always"]))
    assert check_inputs(demo).thinking == "the chat template has no such mode"
    student = tmp_path / "student"
    shutil.copytree(demo.student.path, student)
    path = student / "tokenizer_config.json"
    config = json.loads(path.read_text())
    switch = "{%- if enable_thinking is defined and not enable_thinking -%}{{ ';' }}{%- endif -%}"
    path.write_text(json.dumps(config | {"chat_template": config["chat_template"] + switch}))
    messages = [{"role": "user", "content": "1+1:"}]
    plain = load_chat_tokenizer(student).encode_messages(messages)
    assert load_chat_tokenizer(student, thinking="always").encode_messages(messages) == plain
    off = load_chat_tokenizer(student, thinking="never").encode_messages(messages)
    assert off[:-1] == plain
    thinks = apply_overrides(
        demo,
        [f"student.path={student}", "data.thinking=never", "teachers.main.accept=[chat_template]"],
    )
    assert check_inputs(thinks).thinking == "never"


def test_end_tokens_are_shown(demo: Recipe) -> None:
    assert check_inputs(demo).ends == "<|im_end|>"
