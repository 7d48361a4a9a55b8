from opd_megatron.atomic import *  # noqa: F403
