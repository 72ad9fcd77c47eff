"""Fine-tuning: choosing the trained parameters by name.

Only trained parameters have gradients, optimizer state and a place in the messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from mpips.config import ConfigError
from mpips.model.flat import clean, unwrap

Predicate = Callable[[str, nn.Parameter], bool]
Choice = str | re.Pattern[str] | Predicate
Trainable = Choice | Sequence[Choice]
Names = dict[nn.Parameter, list[str]]  # a tied parameter has several

ALLOWED = 'a name pattern ("head.*", or a compiled re.Pattern), a function of name and parameter, or a sequence of these'


def freeze(model: nn.Module, trainable: Trainable) -> list[str]:
    """Train the parameters that `trainable` selects and freeze all others, whatever their state before.

    A parameter that several modules share is trained if any of its names is selected. A parameter that cannot have a gradient,
    such as a quantised int8 weight, stays frozen. The gradients of frozen parameters are set to None. Buffers are not affected:
    the BatchNorm statistics of a frozen part move on, as in plain PyTorch, unless that part is in eval mode.

    Args:
        model: the model. Names are those of the user's own module, without the prefixes of DDP or `torch.compile`.
        trainable: a glob that must match a whole name ("classifier.*", "*.lora_*"; case-sensitive), a compiled regular
            expression that is searched for in the name, a function of name and parameter, or a sequence of these.

    Returns:
        The names of the trained parameters, each once, in the model's order.

    Raises:
        ConfigError: an entry selects no parameter that can be trained. The message shows the nearest names. The model is then
            unchanged.
    """
    names: Names = {}
    for name, p in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(clean(name))
    chosen = {p for choice in _choices(trainable) for p in _chosen(choice, names)}
    for p in names:
        p.requires_grad_(p in chosen)
        if p not in chosen:
            p.grad = None
    return [own[0] for p, own in names.items() if p in chosen]


def _choices(trainable: Trainable) -> Sequence[Choice]:
    """Return `trainable` as a sequence of single choices."""
    if isinstance(trainable, (str, re.Pattern)) or callable(trainable):
        return [trainable]
    if not isinstance(trainable, Sequence) or not trainable:
        raise ConfigError(f"trainable: given {_show(trainable)}, allowed: {ALLOWED}")
    return trainable


def _chosen(choice: Choice, names: Names) -> list[nn.Parameter]:
    """Return the parameters that a choice selects and that can be trained. Raise ConfigError if there are none."""
    test = _test(choice)
    found = [p for p, own in names.items() if any(test(name, p) for name in own)]
    trainable = [p for p in found if p.is_floating_point() or p.is_complex()]
    if trainable:
        return trainable
    if found:
        allowed = f"what matches a parameter that can have a gradient; {names[found[0]][0]} is {found[0].dtype}"
    else:
        nearest = _nearest(choice, [name for own in names.values() for name in own])
        allowed = f"what matches at least one parameter; the nearest names are {nearest}"
    raise ConfigError(f"trainable: given {_show(choice)}, allowed: {allowed}")


def _test(choice: Choice) -> Predicate:
    """Return the predicate of a choice."""
    if isinstance(choice, str):
        return lambda name, _: fnmatchcase(name, choice)
    if isinstance(choice, re.Pattern) and isinstance(choice.pattern, str):
        return lambda name, _: choice.search(name) is not None
    if callable(choice) and not isinstance(choice, nn.Module):
        return choice
    raise ConfigError(f"trainable: given {_show(choice)}, allowed: {ALLOWED}")


def _nearest(choice: Choice, names: Iterable[str]) -> str:
    """Return up to three names, the most similar first."""
    text = choice if isinstance(choice, str) else choice.pattern if isinstance(choice, re.Pattern) else ""
    return ", ".join(difflib.get_close_matches(text, names, n=3, cutoff=0.0)) or "none, for the model has no parameters"


def _show(given: object) -> str:
    """Return what was given as text on one line."""
    if isinstance(given, re.Pattern):
        return repr(given.pattern)
    if isinstance(given, (str, int, float, list, tuple, type(None))):
        return repr(given)
    return str(getattr(given, "__qualname__", f"a {type(given).__name__}"))
