"""The script's optimizer after `connect`: the same object, whose `step` is a round.

Whatever holds the optimizer can go on doing so: schedulers, GradScaler, hooks, frameworks. Its groups hold the model's
parameters and the hyperparameters that the script sets. Its state is where the parameters are stepped.
"""

from __future__ import annotations

import copyreg
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mpips.config import ConfigError
from mpips.optim.foreign import SWAPS, kind
from mpips.run.state_elsewhere import StateElsewhere, give_state_back, take_state_away
from mpips.run.steps import Steps

HALVES = ("first_step", "second_step")


class Wrapped:
    """The methods that `connect` gives the optimizer in the place of its own; see `_derived`."""

    given_class: type[Optimizer]
    _mpips: Steps
    _which: int  # the number among the optimizers given to `connect`
    _step_supports_amp_scaling = True  # GradScaler then calls `step` whether it has found an Inf or not

    @property
    def state(self) -> Any:
        """The state, as in plain PyTorch; see `StateElsewhere`."""
        return vars(self)["state"]

    @state.setter
    def state(self, state: Any) -> None:
        if isinstance(self.state, StateElsewhere):
            self.state.clear()  # refuses
        vars(self)["state"] = state
        self._mpips.take_over_state(self._which)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients that backward left, let the server step, and pull the new weights.

        Args:
            closure: evaluates the model, calls backward and returns the loss. Called once, before the push, unless the
                optimizer evaluates the loss several times.
        """
        self._opt_called = True  # torch's schedulers warn if they step before this is set
        found = vars(self).get("found_inf")  # set by a GradScaler that calls this
        if found is None:
            return self._mpips.optimizer_step(self._which, closure)
        scaler = _caller()
        state = scaler._per_optimizer_states[id(self)]
        if vars(self)["grad_scale"] is not None:  # the script has not called unscale_
            state["stage"] = OptState.READY
            scaler.unscale_(self)
        overflow = sum(float(tensor) for tensor in state["found_inf_per_device"].values()) > 0
        self._mpips.optimizer_step(self._which, None, overflow)
        for tensor in state["found_inf_per_device"].values():
            tensor.fill_(float(self._mpips.skipped))  # found by any worker, so that update() agrees on all
        return None

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # so that no scheduler replaces the step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a further parameter group.

        Raises:
            RuntimeError: always; the ranks have laid out the parameters that they had at `connect`.
        """
        raise RuntimeError(
            "optimizer.add_param_group() after connect: given a further group, expected all groups before connect; add the "
            "parameters before it, or close this run (ps.close()) and connect again"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, wherever its parts are, in a form that plain PyTorch can load."""
        tree = self._mpips.state_of(self._which)
        this: Any = self
        own: dict[str, Any] = self.given_class.state_dict(this)
        if tree is not None:
            own["state"] = own["state"] | tree  # a frozen parameter's, which Adagrad has, is here alone
        return own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in plain PyTorch.

        Raises:
            RuntimeError: the state is on another rank's server.
        """
        self._mpips.check_loadable(self._which)
        this: Any = self
        self.given_class.load_state_dict(this, state_dict)
        self._mpips.take_over_state(self._which)
        if self._mpips.elsewhere(self._which):
            take_state_away(this)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the optimizer as one of its own class, without mpips, and with the whole state."""
        own: Any = self
        parts, tree = own.__getstate__(), self._mpips.state_of(self._which)
        if tree is not None:
            parameters = [p for group in own.param_groups for p in group["params"]]
            state = defaultdict(dict, parts["state"])
            parts = parts | {"state": state | {parameters[number]: entries for number, entries in tree.items()}}
        return copyreg._reconstructor, (self.given_class, object, None), parts  # type: ignore[attr-defined]


class Barred:
    """The methods of an optimizer whose run has ended and keeps its state; see `_derived`."""

    given_class: type[Optimizer]
    _mode: str

    def step(self, closure: Any = None) -> None:
        """Raise RuntimeError; see `_refuse`."""
        self._refuse("step()")

    def state_dict(self) -> None:
        """Raise RuntimeError; see `_refuse`."""
        self._refuse("state_dict()")

    def _refuse(self, call: str) -> None:
        raise RuntimeError(
            f"optimizer.{call} after ps.close(): given one of a run in mode {self._mode}, whose server has its state; expected "
            f"a new optimizer (the state is in the run's checkpoints)"
        )


def bar(optimizer: Optimizer, mode: str) -> None:
    """Make an optimizer unusable whose state has stayed with the server of a run in this mode."""
    own: Any = optimizer
    given: Any = kind(optimizer)
    own.__class__ = _derived(Barred, given)
    own._mode = mode


def _caller() -> Any:
    """Return the GradScaler whose `step` is calling."""
    frame = sys._getframe(2)
    while not isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
        assert frame.f_back
        frame = frame.f_back
    return frame.f_locals["self"]


def _derived(methods: type, given: Any) -> Any:
    """Return a class derived from the given optimizer class, with the methods of another class in the place of its own.

    That class is no base of it: an object whose class derives from ABC, say, could not be given the new class.
    """
    body = {name: value for name, value in vars(methods).items() if name not in ("__dict__", "__weakref__")}
    body |= {
        "given_class": given,
        "methods": methods,
        "__module__": given.__module__,
        "__doc__": given.__doc__,
        "__slots__": (),
    }
    return type(given)(given.__name__, (given,), body)


def is_wrapped(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is one of a run that goes on."""
    return getattr(type(optimizer), "methods", None) is Wrapped


@cache
def _class_of(given: Any) -> Any:
    """Return the class derived from `Wrapped` and the given optimizer class."""
    derived: Any = _derived(Wrapped, given)
    derived.step = _hooked(derived.step)
    derived.zero_grad = _noted(given.zero_grad)
    if all(hasattr(given, name) for name in HALVES):  # as SAM is commonly written
        for name in HALVES:
            setattr(derived, name, _half(getattr(given, name), name))
    if all(callable(getattr(given, name, None)) for name in SWAPS):
        for name in SWAPS:
            setattr(derived, name, _half(getattr(given, name), "swap"))
    return derived


def _half(method: Any, name: str) -> Any:
    """Wrap a method that changes the weights without a step of the server's; `name` is that of the method of `Steps`."""

    @wraps(method)
    def half(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._mpips, name)(self._which, lambda: method(self, *args, **kwargs))

    return half


def _noted(zero_grad: Any) -> Any:
    """Wrap `zero_grad` so that the run learns of it; its signature, which frameworks look at, stays."""

    @wraps(zero_grad)
    def zeroing(self: Any, *args: Any, **kwargs: Any) -> None:
        zero_grad(self, *args, **kwargs)
        self._mpips.gradients_zeroed()

    return zeroing


def _hooked(step: Any) -> Any:
    """Wrap `step` in torch's hooks and profiler, only in calls where they are in use: saves a twentieth of a small round."""
    whole: Any = Optimizer.profile_hook_step(step)

    @wraps(step)
    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if profiled or hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return whole(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    stepping.hooked = True  # type: ignore[attr-defined]  # keeps torch from wrapping it again
    return stepping


def wrap(optimizer: Optimizer, steps: Steps, which: int) -> None:
    """Let `steps` take the optimizer's steps, by its number `which` among those of the run.

    Raises:
        ConfigError: the optimizer's `step` has been replaced, or it belongs to another run that has not ended.
    """
    if getattr(type(optimizer), "methods", None) is Barred:
        raise ConfigError("optimizer: given one whose state is with the server of an earlier run, allowed: a new one")
    if is_wrapped(optimizer):
        raise ConfigError("optimizer: given one of a run that goes on, allowed: one of its own; end the other by ps.close()")
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            f"optimizer: given a {type(optimizer).__name__} whose step has been replaced by {step!r}, allowed: one that nobody "
            f"has changed; wrap it after connect"
        )
    vars(optimizer).pop("step", None)  # a scheduler's wrapper, whose purpose `Wrapped.step` serves
    own: Any = optimizer
    given: Any = type(own)
    own.__class__ = _class_of(given)
    own._mpips, own._which = steps, which
    if steps.elsewhere(which):
        take_state_away(own)


def unwrap(optimizer: Optimizer) -> None:
    """Give the optimizer its own class back."""
    if is_wrapped(optimizer):
        own: Any = optimizer
        own.__class__ = kind(optimizer)
        del own._mpips, own._which
        give_state_back(optimizer)
