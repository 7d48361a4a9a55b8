"""Does the container see what recipe and site name? Asked at submission, since a job waits in the queue to find out.

Pyxis mounts `FROM:TO[:FLAGS]` or `PATH`; the run directory is always mounted. The recipe's paths are those inside the
container. Left out: whether `FROM` is there, and links that lead out of a mount.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from opd_megatron.config.schema import Recipe
from opd_megatron.errors import ConfigError
from opd_megatron.launch.slurm.site import PREFIX, Site
from opd_megatron.rundir import RunDir


def _wanted(recipe: Recipe, site: Site) -> Iterator[tuple[str, str]]:
    """Key and path of every file or folder that the roles will open."""
    yield "student.path", recipe.student.path
    for name, teacher in recipe.teachers.items():
        yield f"teachers.{name}.path", teacher.path
    yield "data.train", recipe.data.train
    yield "data.heldout", recipe.data.heldout
    for name, path in site.secrets.items():
        yield f"{PREFIX}secrets.{name}", path


def _target(mount: str) -> PurePosixPath:
    """Where a mount is inside the container."""
    source, _, rest = mount.partition(":")
    return PurePosixPath(rest.partition(":")[0] or source)


def check_mounts(recipe: Recipe, site: Site, run: RunDir) -> None:
    """
    Raises:
        ConfigError: a path that no mount holds, or a secret below `~`, which is another folder in a container.
    """
    if not site.container_image:
        return
    targets = [PurePosixPath(run.root), *map(_target, site.container_mounts)]
    for key, text in _wanted(recipe, site):
        path = PurePosixPath(text)
        if text.startswith("~"):
            raise ConfigError.of(key, text, "a container has another home", "write the whole path")
        # A name that was not found here stays a name: the job looks for it.
        if not path.is_absolute() or any(path.is_relative_to(target) for target in targets):
            continue
        raise ConfigError.of(
            key,
            text,
            f"the container does not see it: no entry of {PREFIX}container_mounts holds it",
            f"add {path.parent}:{path.parent}, or a folder above",
        )
