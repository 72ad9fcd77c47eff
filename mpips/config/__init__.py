"""The settings of a run: one frozen tree, resolved once, before MPI starts.

Flags win over `MPIPS_*` variables, these over the YAML file given by `--config`, this over the arguments of `connect`,
these over the defaults. Whatever is not allowed is a `ConfigError` of one line.
"""

from mpips.config.config import GROUPS, TAKEN, Config
from mpips.config.error import BAD_CONFIGURATION, ConfigError
from mpips.config.field import allowed, fields
from mpips.config.flags import SAID, add_arguments, flags_of
from mpips.config.groups import Checkpointing, Clients, Local, Outer, Robust, Staleness, Stopping
from mpips.config.sources import resolve

__all__ = [
    "BAD_CONFIGURATION",
    "GROUPS",
    "SAID",
    "TAKEN",
    "Checkpointing",
    "Clients",
    "Config",
    "ConfigError",
    "Local",
    "Outer",
    "Robust",
    "Staleness",
    "Stopping",
    "add_arguments",
    "allowed",
    "fields",
    "flags_of",
    "resolve",
]
