"""The settings of a run: one frozen tree, resolved once, before MPI starts.

The sources in order of precedence: flags, `MPIPS_*` variables, the YAML file that `config` names, the arguments of `connect`,
the defaults. A value that is not allowed raises a `ConfigError` of one line.

A flag is `mpips run --set KEY=VALUE`, or `--mpips.KEY VALUE` on the script's command line, or `--KEY VALUE` if the script's
parser has the flag from `add_arguments`. If a setting is given in several of these ways, the first one in this order wins.
Other words on the command line are never read.
"""

from mpips.config.chaos import check_chaos
from mpips.config.config import GROUPS, TAKEN, Config
from mpips.config.error import BAD_CONFIGURATION, ConfigError, check, cut, shown
from mpips.config.field import allowed, fields
from mpips.config.file import settings_of
from mpips.config.flags import add_arguments
from mpips.config.groups import Checkpointing, Clients, EarlyStopping, Local, Outer, Robust, Staleness
from mpips.config.line import SET, take_flags, whole_line
from mpips.config.names import check_codec, check_mode, check_names, check_rule
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
    "check_chaos",
    "check_codec",
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
    "settings_of",
    "show",
    "shown",
    "take_flags",
    "trace",
    "whence",
    "whole_line",
]
