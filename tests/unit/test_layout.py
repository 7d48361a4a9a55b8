"""Rules on the source tree that no linter of ours knows."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("opd_megatron", "recipes", "scripts", "tests", "docs", "benchmarks")
MAX_LINES = 400
MEGATRON_ONLY = {"megatron", "transformer_engine"}
PICKLES = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}

SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{30,}"  # GitHub
    r"|AKIA[0-9A-Z]{16}"  # AWS
    r"|nvapi-[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".txt", ".in", ".lock", ".json", ""}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_packages(tree: ast.AST) -> Iterator[str]:
    """Top-level names of absolute imports, wherever they stand in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def unsafe_loads(tree: ast.AST) -> Iterator[int]:
    """Lines of `torch.load(...)` without `weights_only=True`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            )
            if not safe:
                yield node.lineno


def test_no_file_is_longer_than_the_limit() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in python_files(*SOURCE_FOLDERS)
    }
    assert len(lengths) > 20
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_only_the_megatron_package_imports_megatron() -> None:
    inside = ROOT / "opd_megatron" / "megatron"
    offenders = [
        path.relative_to(ROOT).as_posix()
        for path in python_files("opd_megatron", "recipes")
        if inside not in path.parents
        and MEGATRON_ONLY & set(imported_packages(ast.parse(path.read_text())))
    ]
    assert offenders == []


def test_nothing_that_can_run_code_is_unpickled() -> None:
    offenders = []
    for path in python_files("opd_megatron", "recipes"):
        tree = ast.parse(path.read_text())
        name = path.relative_to(ROOT).as_posix()
        offenders += [f"{name}: imports {x}" for x in PICKLES & set(imported_packages(tree))]
        offenders += [f"{name}:{line}: torch.load" for line in unsafe_loads(tree)]
    assert offenders == []


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
    ],
)
def test_unsafe_load_is_seen(source: str, unsafe: bool) -> None:
    assert bool(list(unsafe_loads(ast.parse(source)))) is unsafe


def test_no_secret_stands_in_a_file() -> None:
    assert SECRETS.search("token = 'hf_" + "a" * 34 + "'")
    offenders = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if {"runs", "build", "dist", "__pycache__"} & set(parts) or parts[0].startswith(".venv"):
            continue
        if parts[0] == ".git" or path.suffix not in TEXT_SUFFIXES or not path.is_file():
            continue
        if SECRETS.search(path.read_text(errors="replace")):
            offenders.append(path.relative_to(ROOT).as_posix())
    assert offenders == []


def test_every_package_has_a_place_in_the_layers() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    megatron_rule = next(c for c in settings["contracts"] if "Megatron-Core" in c["name"])
    covered = {name.removeprefix("opd_megatron.") for name in megatron_rule["source_modules"]}
    present = {
        path.stem
        for path in (ROOT / "opd_megatron").iterdir()
        if (path / "__init__.py").is_file() or path.suffix == ".py"
    }
    assert present - covered == {"megatron", "__init__", "__main__"}


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_foreign_apex_is_in_no_lock() -> None:
    pins = [path for path in (ROOT / "locks").iterdir() if path.suffix in {".lock", ".txt", ".in"}]
    assert pins
    assert [p.name for p in pins if re.search(r"^apex\b", p.read_text(), re.MULTILINE)] == []
