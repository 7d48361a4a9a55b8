"""Import stand-ins that let SGLang's torch-native path run where its GPU packages cannot be.

SGLang imports `sgl_kernel`, `torchvision` and `triton` at the top of modules that the CPU path also
needs, but on `--device cpu --attention-backend torch_native` it calls no kernel of theirs.
`install()` registers a finder that answers those imports, for the packages that are really absent,
with modules whose attributes exist:

    sgl_kernel, torchvision   a capitalized name is an empty class, any other a function that raises
                              `KernelUnavailable` when called: loud, never a wrong number
    triton                    every name is a further module that is also a pass-through decorator,
                              because kernels are decorated (not run) at import

It must run before SGLang is imported; `sglang_main` calls it and then forks SGLang's workers, which
so inherit the stand-ins. On a GPU nothing here is loaded. What a CPU run does not prove: CUDA
graphs, overlap scheduling, fused attention, NCCL, bf16 and fp8.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

KERNEL_PACKAGES = ("sgl_kernel", "torchvision")
COMPILER_PACKAGE = "triton"
# SGLang and torch compare this with minimum versions: pass for a current release.
_COMPILER_VERSION = "3.7.0"


class KernelUnavailable(RuntimeError):
    """A kernel of a package that is not installed on this CPU machine was called."""


class InterpolationMode(enum.Enum):
    """Stands in for `torchvision.transforms.InterpolationMode`: image code builds tables of it."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _EmptyClass:
    """Base of classes that are only named, subclassed or used in annotations at import."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Constants:
    """Every attribute exists, for tables that are built from constants at import."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Constants()


_REAL_VALUES: dict[str, Any] = {
    "InterpolationMode": InterpolationMode,
    "scalar_types": _Constants(),
}


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _loud(full_name: str) -> Callable[..., Any]:
    def unavailable(*args: Any, **kwargs: Any) -> Any:
        # A bare decorator (`@register` over a function) runs at import and must be harmless.
        if len(args) == 1 and isinstance(args[0], types.FunctionType | type) and not kwargs:
            return args[0]
        raise KernelUnavailable(f"{full_name} was called, but its package is not installed on CPU")

    unavailable.__name__ = unavailable.__qualname__ = full_name.rsplit(".", 1)[-1]
    return unavailable


class _KernelModule(types.ModuleType):
    """Stands in for a package of kernels."""

    def __getattr__(self, name: str) -> Any:
        if _is_dunder(name):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        if name in _REAL_VALUES:
            value = _REAL_VALUES[name]
        elif name[:1].isupper():
            value = type(name, (_EmptyClass,), {"__module__": self.__name__})
        else:
            value = _loud(full_name)
        setattr(self, name, value)
        return value


class _CompilerModule(types.ModuleType):
    """Stands in for triton: names are modules, calls are decorators, nothing compiles."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return _COMPILER_VERSION
        if _is_dunder(name):
            raise AttributeError(name)
        if name[:1].isupper():
            value: Any = type(name, (_EmptyClass,), {"__module__": self.__name__})
        else:
            full_name = f"{self.__name__}.{name}"
            value = sys.modules.setdefault(full_name, _CompilerModule(full_name))
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function=None, *rest, **more: function

    def __getitem__(self, key: Any) -> _CompilerModule:
        return self


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        is_compiler = spec.name.split(".")[0] == COMPILER_PACKAGE
        return _CompilerModule(spec.name) if is_compiler else _KernelModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def absent_packages() -> tuple[str, ...]:
    """The packages of the list above that are not installed here."""
    names = (*KERNEL_PACKAGES, COMPILER_PACKAGE)
    return tuple(name for name in names if importlib.util.find_spec(name) is None)


def install() -> tuple[str, ...]:
    """Register the stand-ins for the absent packages; a second call changes nothing.

    Returns:
        The packages that are stood in for.
    """
    for finder in sys.meta_path:
        if isinstance(finder, _StandInFinder):
            return tuple(sorted(finder.packages))
    packages = absent_packages()
    if "torchvision" in packages:
        # transformers caches the answer, so it must ask while torchvision is still absent.
        from transformers.utils.import_utils import is_torchvision_available

        is_torchvision_available()
    sys.meta_path.insert(0, _StandInFinder(packages))
    return tuple(sorted(packages))
