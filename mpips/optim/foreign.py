"""Optimizers of any class: whose class it is, and who is to take its step.

The server steps what it can in the place of the workers. Where the script has to see what a step does besides changing the
weights, every worker takes the step itself.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cache
from numbers import Number
from operator import attrgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpips.checkpoint.snapshot import Snapshot
from mpips.config import ConfigError
from mpips.process import rng

_is_cpu = attrgetter("is_cpu")
SWAPS = ("train", "eval")  # the methods by which a schedule-free optimizer swaps the weights


def kind(optimizer: Optimizer) -> type[Optimizer]:
    """Return the optimizer's class as the script made it; `connect` replaces the class of the script's object by a subclass."""
    return getattr(type(optimizer), "given_class", type(optimizer))


def is_torchs(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's class is torch's or this package's."""
    return kind(optimizer).__module__.startswith(("torch.optim.", "mpips."))


def nested(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers that this one wraps, as SAM and Lookahead do, by attribute name."""
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, Optimizer)}


def unhooked(optimizer: Optimizer) -> Callable[..., Any]:
    """Return the class's `step` without torch's hook wrapper. The hooks run where the script calls `step`."""
    step: Any = kind(optimizer).step
    wrapper = getattr(step, "__globals__", {}).get("__name__")
    if wrapper == "torch.optim.optimizer" and getattr(step, "hooked", False):  # and no foreign wrapper around it
        return cast("Callable[..., Any]", step.__wrapped__)
    return cast("Callable[..., Any]", step)


def step_once(optimizer: Optimizer, scale: float = 1.0) -> None:
    """Take one step of the optimizer, with its learning rates times `scale`, without hooks: they run where the script steps.

    The step of a class of torch's runs without torch's wrappers for profiling and differentiability, unless those are in use.
    The wrappers take half the time of a step of a small model.
    """
    if scale == 1:
        _step(optimizer)
        return
    with _scaled(optimizer, scale):
        _step(optimizer)


@contextmanager
def _scaled(optimizer: Optimizer, scale: float) -> Iterator[None]:
    """Multiply the learning rates by `scale` within the context."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * scale
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _step(optimizer: Optimizer) -> None:
    step = kind(optimizer).step
    bare = _unwrapped(step)
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    if bare is None or profiled or optimizer.defaults.get("differentiable"):
        _step_alone(optimizer)
        return
    graded, groups = torch.is_grad_enabled(), _on_host(optimizer)
    torch._C._set_grad_enabled(False)  # what no_grad calls, at a tenth of its time
    for group in groups:
        group["foreach"] = False  # what torch would decide, at a tenth of a small step's time
    try:
        bare(optimizer)
    finally:
        torch._C._set_grad_enabled(graded)
        for group in groups:
            group["foreach"] = None


def _on_host(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups whose parameters are all in host memory, for which torch decides between its implementations."""
    return [
        group
        for group in optimizer.param_groups
        if group.get("foreach", False) is None and not group.get("fused") and all(map(_is_cpu, group["params"]))
    ]


def _step_alone(optimizer: Optimizer) -> None:
    """Take a step without a closure, of any class.

    Raises:
        ConfigError: the class's step needs a closure.
    """
    try:
        unhooked(optimizer)(optimizer)
    except (AssertionError, TypeError) as error:
        why = str(error) or type(error).__name__
        raise ConfigError(
            f"optimizer: given a {kind(optimizer).__name__}, whose step fails without a closure ({why}); allowed: "
            f"optimizer.step(closure) in the place of optimizer.step() and ps.step()"
        ) from error


@cache
def _unwrapped(step: Any) -> Callable[[Optimizer], object] | None:
    """Return torch's own `step` without torch's wrappers; None if the class, or a wrapper around `step`, is not torch's."""
    while step.__module__.startswith("torch.optim.") and hasattr(step, "__wrapped__"):
        if not step.__globals__["__name__"].startswith("torch."):
            return None
        step = step.__wrapped__
    return step if step.__module__.startswith("torch.optim.") else None


def evaluates(optimizer: Optimizer, closure: bool) -> bool:
    """Return whether every worker takes the same step itself and the server takes over the resulting weights.

    That holds for optimizers that may evaluate the loss several times (`closure`), for optimizers whose state lies in other
    optimizers that they wrap, and for LBFGS and SparseAdam. In rounds it holds where one `needs_its_own_step`, too.
    """
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        return True  # SparseAdam needs the sparse gradients that backward left
    return not is_torchs(optimizer) and (closure or bool(nested(optimizer)))


def swaps(optimizer: Optimizer) -> bool:
    """Return whether the optimizer has methods that swap the weights between training and evaluation, as schedule-free ones."""
    return all(callable(getattr(kind(optimizer), name, None)) for name in SWAPS)


@dataclass
class Trial:
    """What two steps of a copy of an optimizer, with a parameter of its own in each group, have shown.

    Attributes:
        changes: whether they have changed numbers in the groups.
        states: the state of each parameter afterwards.
    """

    changes: bool = False
    states: Sequence[Any] = ()


_trials: WeakKeyDictionary[Optimizer, Trial] = WeakKeyDictionary()


def trial(optimizer: Optimizer) -> Trial:
    """Try an optimizer of another library, once.

    Nothing is known of torch's, which need no trial, of those that wrap others, which would take the steps in earnest, and of
    those whose steps fail, as they may need what only the script's own parameters have.
    """
    if optimizer not in _trials:
        _trials[optimizer] = Trial() if is_torchs(optimizer) or nested(optimizer) else _try(optimizer)
    return _trials[optimizer]


def _try(optimizer: Optimizer) -> Trial:
    copied = (list, dict, set)
    twin, streams = object.__new__(kind(optimizer)), rng.capture()
    vars(twin).update({k: copy(v) if isinstance(v, copied) else v for k, v in vars(optimizer).items() if k != "step"})
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [nn.Parameter(torch.ones(2, 2))]} for group in optimizer.param_groups]
    try:
        if swaps(optimizer):
            getattr(twin, SWAPS[0])()
        before = _numbers_of(twin)
        with _uncompiled():
            for _ in range(2):
                for group in twin.param_groups:
                    group["params"][0].grad = torch.full((2, 2), 0.1)
                unhooked(twin)(twin)
    except Exception:  # of any kind
        return Trial()
    finally:
        rng.restore(streams)
    return Trial(_numbers_of(twin) != before, list(twin.state.values()))


def _uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which functions of `torch.compile` are not compiled, which takes seconds."""
    compiles = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # torch 2.6
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def has_own_numbers(optimizer: Optimizer) -> bool:
    """Return whether a step changes numbers in the optimizer's groups, as those of Prodigy and of schedule-free ones do."""
    return trial(optimizer).changes


def has_plain_state(optimizer: Optimizer) -> bool:
    """Return False if `trial` has shown a parameter's state other than tensors and numbers by name."""
    try:
        Snapshot({str(at): state for at, state in enumerate(trial(optimizer).states)})
    except (TypeError, ValueError):
        return False
    return True


def needs_its_own_step(optimizer: Optimizer) -> bool:
    """Return whether only the script's own object can take a step as in plain PyTorch."""
    return swaps(optimizer) or has_own_numbers(optimizer) or not has_plain_state(optimizer)


def _numbers_of(optimizer: Optimizer) -> list[dict[str, float]]:
    """Return the numbers in each group by name, those that are no hyperparameters, too."""
    kinds = (Number, np.generic)
    return [
        {key: float(value) for key, value in group.items() if isinstance(value, kinds) or _is_one_number(value)}
        for group in optimizer.param_groups
    ]


def _is_one_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
