"""The settings of a run: one frozen tree, resolved once, before MPI starts.

Flags win over `MPIPS_*` variables, these over the YAML file that `config` names, this over the arguments of `connect`, these
over the defaults. Whatever is not allowed is a `ConfigError` of one line.

A flag is `mpips run --set KEY=VALUE`, or on the script's line `--mpips.KEY VALUE`, or `--KEY VALUE` where the script's parser
has it from `add_arguments`; given in several ways, they win in this order. Other words of the line are never looked at.
"""

from mpips.config.config import GROUPS, TAKEN, Config
from mpips.config.error import BAD_CONFIGURATION, ConfigError
from mpips.config.field import allowed, fields
from mpips.config.flags import add_arguments
from mpips.config.groups import Checkpointing, Clients, Local, Outer, Robust, Staleness, Stopping
from mpips.config.line import SET, take_flags, whole_line
from mpips.config.show import show
from mpips.config.sources import Resolved, check_set, resolve, trace

__all__ = [
    "BAD_CONFIGURATION",
    "GROUPS",
    "SET",
    "TAKEN",
    "Checkpointing",
    "Clients",
    "Config",
    "ConfigError",
    "Local",
    "Outer",
    "Resolved",
    "Robust",
    "Staleness",
    "Stopping",
    "add_arguments",
    "allowed",
    "check_set",
    "fields",
    "resolve",
    "show",
    "take_flags",
    "trace",
    "whole_line",
]
