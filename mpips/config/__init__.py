"""The settings of a run: one frozen tree, resolved once, before MPI starts.

Flags win over `MPIPS_*` variables, these over the YAML file that `config` names, this over the arguments of `connect`, these
over the defaults. Whatever is not allowed is a `ConfigError` of one line.

A flag is `mpips run --set KEY=VALUE`, or on the script's line `--mpips.KEY VALUE`, or `--KEY VALUE` where the script's parser
has it from `add_arguments`; given in several ways, they win in this order. Other words of the line are never looked at.
"""

from mpips.config.config import GROUPS, TAKEN, Config
from mpips.config.error import BAD_CONFIGURATION, ConfigError, check, cut, shown
from mpips.config.field import allowed, fields
from mpips.config.flags import add_arguments
from mpips.config.groups import Checkpointing, Clients, EarlyStopping, Local, Outer, Robust, Staleness
from mpips.config.line import SET, take_flags, whole_line
from mpips.config.names import check_mode, check_names, check_rule
from mpips.config.paths import ANSWERS, check_resume, check_run_dir, no_folder
from mpips.config.show import show
from mpips.config.sources import Resolved, foreseen, resolve, trace, whence

__all__ = [
    "ANSWERS",
    "BAD_CONFIGURATION",
    "GROUPS",
    "SET",
    "TAKEN",
    "Checkpointing",
    "Clients",
    "Config",
    "ConfigError",
    "EarlyStopping",
    "Local",
    "Outer",
    "Resolved",
    "Robust",
    "Staleness",
    "add_arguments",
    "allowed",
    "check",
    "check_mode",
    "check_names",
    "check_resume",
    "check_rule",
    "check_run_dir",
    "cut",
    "fields",
    "foreseen",
    "no_folder",
    "resolve",
    "show",
    "shown",
    "take_flags",
    "trace",
    "whence",
    "whole_line",
]
