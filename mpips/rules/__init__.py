"""The aggregation rules: a rule combines the contributions of one round into one result.

A rule's attribute `needs` selects the collectives (`reduce/aggregate.py`): "sum" is a Reduce. "rows" is a Gather, slice by
slice. "gram" is a Gather for the Gram matrix of the contributions, followed by a Reduce with the resulting coefficients. To add
a rule, derive a class from `Rule` and enter it in RULES (see CONTRIBUTING.md), or keep the class in a module of your own and
configure it by its import path.

| rule      | the result                                                    | needs      | withstands                   |
|-----------|---------------------------------------------------------------|------------|------------------------------|
| mean      | the mean, weighted by samples                                 | sum        | nothing                      |
| normclip  | the same, of contributions clipped to norm clip_radius        | sum        | bounds what each can do      |
| median    | the median of each coordinate                                 | rows       | less than half               |
| trimmed   | the mean without the f smallest and f largest of a coordinate | rows       | f, 2 f < n                   |
| sign      | the sign that most have                                       | rows       | less than half               |
| krum      | the contribution that is nearest to its neighbours            | gram       | f, 2 f + 2 < n               |
| multikrum | the mean of the n - f best of Krum                            | gram       | f, 2 f + 2 < n               |
| bulyan    | Krum's choice, trimmed around the median                      | gram, rows | f, 4 f + 3 <= n              |
| rfa       | the geometric median                                          | gram       | less than half of the weight |
| cclip     | the last result, moved by differences clipped to clip_radius  | gram       | bounds what each can do      |

n is the number of contributions, f is `robust.num_byzantine`, clip_radius is `robust.clip_radius`. A contribution comes from a
worker; in federated modes it comes from one client of the round, whichever rank hosts the client (`reduce/client_rows.py`).
Rules that need "gram" trust the second collective: a rank that sends different data in the Reduce than in the Gather is not
detected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from mpips.config import Config, ConfigError, check_rule, cut, shown
from mpips.rules.coordinate import Median, SignMajority, TrimmedMean
from mpips.rules.gram import Bulyan, CentredClipping, GeometricMedian, Krum, MultiKrum
from mpips.rules.mean import Mean, NormClip
from mpips.rules.protocol import Needs, Rule, RuleError

__all__ = ["RULES", "Mean", "Needs", "Rule", "RuleError", "choose"]

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
    """Return the configured rule, and what the communicator must bring for the final combination: "sum" or "rows".

    In deterministic mode the communicator brings rows for every rule. The constructor of a rule receives those settings of the
    group `robust` whose names are parameters of the constructor.

    Raises:
        ConfigError: there is no rule of that name, or the rule's class cannot be loaded or constructed.
    """
    make = RULES[config.rule] if config.rule in RULES else _load(config.rule)
    rule = _make(make, config)
    final = rule.needs if rule.needs != "gram" else rule.then
    return rule, "rows" if config.deterministic else final


def _load(name: str) -> type[Rule]:
    """Import a rule's class from outside this package, given as `package.module:Class` or `package.module.Class`.

    Importing the module is the only foreign code that runs here. A name that is no class derived from `Rule`, such as
    `sys:exit`, is refused and never called.
    """
    check_rule(name, RULES)
    place, _, attribute = name.rpartition(":" if ":" in name else ".")
    try:
        found = getattr(importlib.import_module(place), attribute)
    except (Exception, SystemExit) as error:  # importing a foreign module may raise anything
        raise ConfigError(f"rule: given {shown(name)}, which cannot be loaded ({_why(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ConfigError(f"rule: given {shown(name)}, which is no class derived from mpips.rules.Rule")
    return found


def _why(error: BaseException) -> str:
    """Return an exception as one short line of text."""
    return cut(" ".join(f"{type(error).__name__}: {error}".split()))


def _make(make: Callable[..., Rule], config: Config) -> Rule:
    """Construct the rule from the settings of the group `robust`; raise ConfigError where that fails."""
    try:
        names = inspect.signature(make).parameters
        rule = make(**{name: value for name, value in vars(config.robust).items() if name in names})
    except (Exception, SystemExit) as error:  # a foreign constructor may raise anything
        raise ConfigError(f"rule: given {shown(config.rule)}, which cannot be made ({_why(error)})") from None
    if getattr(rule, "needs", None) not in ("sum", "rows", "gram") or rule.then not in ("sum", "rows"):
        raise ConfigError(f"rule: given {shown(config.rule)}, which says needs or then as none may")
    return rule
