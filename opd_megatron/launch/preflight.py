"""What can be checked in a second, before any process is started: models, layout, tokenizers, rows, grader, device.

No torch. Left out: what needs the tokenizer itself (`data/prompts.py`) and whether the device has room.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from opd_megatron.config.locations import how_to_get_model, is_model_name
from opd_megatron.config.schema import Recipe
from opd_megatron.data.rows import RowScan, scan_rows
from opd_megatron.data.tokenizer_files import compare_tokenizers, tokenizer_fingerprint
from opd_megatron.data.tokenizer_form import tokenizer_form
from opd_megatron.errors import ConfigError, DataError
from opd_megatron.eval.grading import make_grader
from opd_megatron.launch.contracts import check_not_student, check_thinking, check_vocabulary_uses
from opd_megatron.launch.doctor import package_folder, torch_cuda
from opd_megatron.launch.gpus import check_named_hardware, check_precision, parse_cuda, visible_gpus
from opd_megatron.launch.loss_checks import check_aliases, check_environment, check_loss, check_task
from opd_megatron.launch.teaching_checks import check_teaching
from opd_megatron.megatron.architecture import architecture_of, check_layout, check_teacher
from opd_megatron.megatron.layout import check_micro_batch
from opd_megatron.megatron.precision import fp8_settings

# The second is there in containers that see a device and not the host's /proc entries.
_NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))


@dataclass(frozen=True)
class InputFacts:
    """What the checks found, for `opd validate` and the head of a run."""

    vocab_size: int
    tokenizer_digest: str
    eos_ids: tuple[int, ...]
    ends: str
    thinking: str
    train: RowScan
    heldout: RowScan | None


def read_model_config(directory: Path, key: str) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        ConfigError: no such directory, no weights in it, or an unreadable config.json.
    """
    if not directory.is_dir():
        if is_model_name(str(directory)):
            raise ConfigError.of(key, str(directory), *how_to_get_model(str(directory)))
        raise ConfigError.of(
            key,
            str(directory),
            "no such directory",
            "download the model and give the path of its folder",
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError.of(
            key, str(directory), "holds no .safetensors file", "convert the weights"
        )
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError.of(
            key, str(directory), f"config.json: {error}", "copy the model again"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError.of(
            key, str(directory), "config.json is not an object", "copy the model again"
        )
    return cast(dict[str, Any], config)


def _check_context(config: dict[str, Any], key: str, recipe: Recipe) -> None:
    longest = recipe.data.max_prompt_tokens + recipe.max_response_tokens
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and longest > context:
        raise ConfigError.of(
            key,
            config.get("_name_or_path", key),
            f"its context of {context} tokens is shorter than data.max_prompt_tokens="
            f"{recipe.data.max_prompt_tokens} + {recipe.max_response_tokens} tokens of a response "
            f"(rollout.max_new_tokens={recipe.rollout.max_new_tokens}, environment.max_turns="
            f"{recipe.environment.max_turns})",
            f"lower rollout.max_new_tokens to {recipe.max_new_tokens_within(context)}",
        )


def check_machine(recipe: Recipe) -> None:
    """Whether this machine has the recipe's kind of device. A recipe may be validated where it can not run.

    Raises:
        ConfigError: `device=cuda` without a driver, or with a CPU build of torch.
    """
    if recipe.device != "cuda":
        return
    if not any(path.exists() for path in _NVIDIA_DRIVER):
        raise ConfigError.of(
            "device",
            "cuda",
            "this machine has no NVIDIA driver",
            "run on a machine with GPUs, or choose a recipe with device=cpu, such as demo",
        )
    if torch_cuda() is None:
        raise ConfigError.of(
            "device",
            "cuda",
            "torch in this environment is a CPU build",
            "install the production pins (locks/README.md)",
        )


def check_learner(recipe: Recipe, here: bool = True) -> None:
    """Whether the learner knows the student's architecture, the layout divides it, and the precision
    fits its layers and this machine's GPUs, if it has any; the same of the teachers inside it.

    Args:
        here: it will run on this machine. A login node's GPUs say nothing of those of the nodes.

    Raises:
        ConfigError: as `architecture_of`, `check_layout`, `check_micro_batch`, `check_teacher`, `fp8_settings`,
            `check_named_hardware` and `check_precision`.
    """
    student = Path(recipe.student.path)
    config = read_model_config(student, "student.path")
    arch = architecture_of(config, str(student / "config.json"))
    check_layout(arch, recipe.learner)
    check_micro_batch(recipe)
    fp8_settings(arch.num_layers, recipe.learner)
    check_named_hardware(recipe)
    for name, teacher in recipe.in_process_teachers.items():
        config = read_model_config(Path(teacher.path), f"teachers.{name}.path")
        own = architecture_of(config, str(Path(teacher.path) / "config.json"))
        check_teacher(name, own, arch, recipe.learner)
    if not here:
        return
    has_torch = package_folder("torch") is not None
    cuda = parse_cuda(torch_cuda()) if has_torch else None
    check_precision(recipe, visible_gpus(cuda))


def _check_evaluation(recipe: Recipe, heldout: RowScan) -> None:
    make_grader(recipe.evaluation.grader)
    for row in heldout.rows[: recipe.evaluation.problems]:
        if row.answer is None:
            raise DataError(
                f"data.heldout={str(heldout.path)!r}: {row.source} has no {recipe.data.answer_key!r}, and "
                f"evaluation needs one; add it or set data.answer_key"
            )


def check_inputs(recipe: Recipe) -> InputFacts:
    """Check the loss, model directories, that student and teachers share one tokenizer, every data row, the grader.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    check_loss(recipe)
    student = Path(recipe.student.path)
    _check_context(read_model_config(student, "student.path"), "student.path", recipe)
    for name, teacher in recipe.teachers.items():
        key = f"teachers.{name}.path"
        _check_context(read_model_config(Path(teacher.path), key), key, recipe)
        compare_tokenizers(student, Path(teacher.path), name, teacher.aliases, teacher.accept)
        if not recipe.is_supervised:
            check_not_student(student, name, teacher)
    check_aliases(recipe)
    fingerprint = tokenizer_fingerprint(student)
    check_vocabulary_uses(recipe, fingerprint.vocab_size)
    check_thinking(recipe)
    train = scan_rows(
        Path(recipe.data.train), recipe.data, recipe.teachers, with_response=recipe.is_supervised
    )
    check_task(recipe, train)
    check_environment(recipe, train)
    fingerprint = tokenizer_fingerprint(student)
    check_teaching(recipe, train, fingerprint.vocab_size)
    heldout = None
    if recipe.data.heldout:
        heldout = scan_rows(Path(recipe.data.heldout), recipe.data, recipe.teachers, "data.heldout")
        _check_evaluation(recipe, heldout)
    return InputFacts(
        vocab_size=fingerprint.vocab_size,
        tokenizer_digest=fingerprint.digest,
        eos_ids=fingerprint.eos_ids,
        ends=" ".join(fingerprint.tokens.get(i, str(i)) for i in fingerprint.eos_ids),
        thinking=_thinking(recipe),
        train=train,
        heldout=heldout,
    )


def _thinking(recipe: Recipe) -> str:
    """In words, what the student's chat template is asked for."""
    if not tokenizer_form(Path(recipe.student.path)).can_switch_thinking:
        return "the chat template has no such mode"
    asked = recipe.data.thinking
    return "as the chat template does by itself" if asked == "template" else asked
