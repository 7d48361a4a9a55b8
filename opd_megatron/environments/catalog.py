"""The environments that a recipe can name."""

from __future__ import annotations

from opd_megatron.config.schema import EnvironmentConfig
from opd_megatron.environments import try_again  # noqa: F401  registers itself
from opd_megatron.environments.environment import ENVIRONMENTS, NewEnvironment


def environment_maker(config: EnvironmentConfig) -> NewEnvironment:
    """What makes fresh objects of the environment that the recipe names, one for each episode.

    Raises:
        ConfigError: no such environment, or something that it needs is missing.
    """
    return ENVIRONMENTS.get(config.name, "environment.name")(config)
