"""What "together" means: a rule turns the contributions of a round into one.

A rule says what it `needs`, and that alone picks the collectives (`reduce/aggregate.py`): "sum" a Reduce; "rows" a Gather,
slice by slice; "gram" a Gather for inner products of whole contributions, then a Reduce with the coefficients. To add one,
derive a class from `Rule` and enter it in RULES (see CONTRIBUTING.md), or leave it in a module of your own and give its name.

| rule      | needs | what                                                                | faulty ones it withstands       |
|-----------|-------|---------------------------------------------------------------------|---------------------------------|
| mean      | sum   | samples-weighted mean                                               | none                            |
| normclip  | sum   | the same, of contributions cut to `robust.clip_radius`              | bounds what each can do         |
| median    | rows  | coordinate-wise median                                              | less than half                  |
| trimmed   | rows  | mean without the f smallest and largest of a coordinate             | f, 2 f < n                      |
| sign      | rows  | the sign that most have                                             | less than half                  |
| krum      | gram  | the one nearest to its neighbours                                   | f, 2 f + 2 < n                  |
| multikrum | gram  | the mean of the n - f best of Krum                                  | f, 2 f + 2 < n                  |
| bulyan    | gram  | Krum's choice, trimmed around the median                            | f, 4 f + 3 <= n                 |
| rfa       | gram  | geometric median                                                    | less than half of the weight    |
| cclip     | gram  | last result, moved by differences cut to `robust.clip_radius`       | bounds what each can do         |

f is `robust.num_byzantine`. Contributions are those of workers; in federated modes those of a round's clients, wherever they
are hosted (`reduce/client_rows.py`). "gram" trusts its second collective: a rank that sends something else in the sum than what
its inner products were computed from is not noticed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from mpips.config import Config, ConfigError, check_rule, cut, shown
from mpips.rules.coordinate import Median, SignMajority, TrimmedMean, strips
from mpips.rules.gram import Bulyan, CentredClipping, GeometricMedian, Krum, MultiKrum
from mpips.rules.mean import Mean, NormClip
from mpips.rules.protocol import Needs, Rule, RuleError

__all__ = ["RULES", "Mean", "Needs", "Rule", "RuleError", "choose", "strips"]

RULES: dict[str, Callable[..., Rule]] = {
    "mean": Mean,
    "median": Median,
    "trimmed": TrimmedMean,
    "krum": Krum,
    "multikrum": MultiKrum,
    "bulyan": Bulyan,
    "rfa": GeometricMedian,
    "cclip": CentredClipping,
    "normclip": NormClip,
    "sign": SignMajority,
}


def choose(config: Config) -> tuple[Rule, Needs]:
    """The configured rule, and what the communicator must bring in the end: rows, in deterministic mode, for any rule.

    A rule's constructor is given those settings of the group `robust` that it has parameters of the same names for.

    Raises:
        ConfigError: no rule of that name.
    """
    make = RULES[config.rule] if config.rule in RULES else _load(config.rule)
    rule = _make(make, config)
    last = rule.needs if rule.needs != "gram" else rule.then
    return rule, "rows" if config.deterministic else last


def _load(name: str) -> type[Rule]:
    """A rule outside this package: `package.module:Class` or `package.module.Class`.

    Nothing of somebody else's but the module's own lines and such a class's constructor is called: not `sys:exit`.
    """
    check_rule(name, RULES)
    place, _, attribute = name.rpartition(":" if ":" in name else ".")
    try:
        found = getattr(importlib.import_module(place), attribute)
    except (Exception, SystemExit) as error:  # whatever a module of somebody else's raises when it is imported
        raise ConfigError(f"rule: given {shown(name)}, which cannot be loaded ({_why(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ConfigError(f"rule: given {shown(name)}, which is no class derived from mpips.rules.Rule")
    return found


def _why(error: BaseException) -> str:
    """An exception in part of a line."""
    return cut(" ".join(f"{type(error).__name__}: {error}".split()))


def _make(make: Callable[..., Rule], config: Config) -> Rule:
    try:
        names = inspect.signature(make).parameters
        rule = make(**{name: value for name, value in vars(config.robust).items() if name in names})
    except (Exception, SystemExit) as error:  # whatever a rule of somebody else's raises
        raise ConfigError(f"rule: given {shown(config.rule)}, which cannot be made ({_why(error)})") from None
    if getattr(rule, "needs", None) not in ("sum", "rows", "gram") or rule.then not in ("sum", "rows"):
        raise ConfigError(f"rule: given {shown(config.rule)}, which says needs or then as none may")
    return rule
