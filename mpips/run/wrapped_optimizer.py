"""The script's optimizer after `connect`: the same object, whose `step` is the round.

Everything else in a script may go on holding it: schedulers, GradScaler, hooks, frameworks. Its groups hold the model's own
parameters and whatever numbers the script sets; its state is where the parameters are stepped.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mpips.config import ConfigError
from mpips.optim.flat_optimizer import kind


class Stepping(Protocol):
    """What a wrapped optimizer calls: a run."""

    def optimizer_step(self, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """Push, combine, step on the server, pull; `overflow` says what a GradScaler has found here, if one calls."""

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step, because a GradScaler had found an Inf or NaN."""

    def check_loadable(self) -> None:
        """Raise RuntimeError where a state that the script loads would not be the one that steps."""

    def optimizer_loaded(self) -> None:
        """The script has loaded a state."""

    def optimizer_state(self) -> dict[int, Any] | None:
        """The state as `state_dict` has it, by number; None where it is the optimizer's own already."""


class Wrapped:
    """What `connect` puts before an optimizer's own class."""

    given_class: type[Optimizer]
    _mpips: Stepping
    _step_supports_amp_scaling = True  # GradScaler then calls `step` whether it has found an Inf or not

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients that backward left, let the server step, and pull the new weights.

        Args:
            closure: evaluates the model, calls backward, and returns the loss; called once, before the push.
        """
        self._opt_called = True  # a scheduler of torch's looks whether it comes after a step
        found = vars(self).get("found_inf")  # which a GradScaler that calls this has put here
        if found is None:
            return self._mpips.optimizer_step(closure)
        scaler = _caller()
        state = scaler._per_optimizer_states[id(self)]
        if vars(self)["grad_scale"] is not None:  # the script has not called unscale_
            state["stage"] = OptState.READY
            scaler.unscale_(self)
        here = sum(float(tensor) for tensor in state["found_inf_per_device"].values()) > 0
        self._mpips.optimizer_step(None, overflow=here)
        for tensor in state["found_inf_per_device"].values():
            tensor.fill_(float(self._mpips.skipped))  # found by any worker: update() is then alike on all
        return None

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # so that it does not put a step of its own there

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a further group.

        Raises:
            RuntimeError: always; the ranks have laid out the parameters that they had at `connect`.
        """
        raise RuntimeError(
            "optimizer.add_param_group() after connect: given a further group, expected all groups before connect; add the "
            "parameters before it, or close this run (ps.close()) and connect again"
        )

    def state_dict(self) -> dict[str, Any]:
        """The whole state, wherever the pieces are, as plain PyTorch loads it."""
        tree = self._mpips.optimizer_state()
        own: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        if tree is not None:
            own["state"] = tree
        return own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, as plain PyTorch does.

        Raises:
            RuntimeError: the state lies with a server elsewhere.
        """
        self._mpips.check_loadable()
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self._mpips.optimizer_loaded()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain optimizer."""
        own: Any = self
        return copyreg.__newobj__, (self.given_class,), own.__getstate__()  # type: ignore[attr-defined]


def _caller() -> Any:
    """The GradScaler whose `step` is at work."""
    frame = sys._getframe(2)
    while not isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
        assert frame.f_back
        frame = frame.f_back
    return frame.f_locals["self"]


@cache
def _class_of(given: Any) -> Any:
    made: Any = type(given.__name__, (Wrapped, given), {"given_class": given, "__module__": given.__module__})
    made.step = _hooked(made.step)
    return made


def _hooked(step: Any) -> Any:
    """With torch's hooks and profiler around it where somebody uses them: a twentieth of a small round."""
    whole: Any = Optimizer.profile_hook_step(step)

    @wraps(step)
    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        looked_at = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if looked_at or hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return whole(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    stepping.hooked = True  # type: ignore[attr-defined]  # or torch would wrap it again
    return stepping


def wrap(optimizer: Optimizer, run: Stepping) -> None:
    """Let the optimizer's `step` be a round of `run`.

    Raises:
        ConfigError: its `step` has been replaced, or it belongs to another run that has not ended.
    """
    if isinstance(optimizer, Wrapped):
        raise ConfigError("optimizer: given one of a run that goes on, allowed: one of its own; end the other by ps.close()")
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            f"optimizer: given a {type(optimizer).__name__} whose step has been replaced by {step!r}, allowed: one that nobody "
            f"has changed; wrap it after connect"
        )
    vars(optimizer).pop("step", None)  # a scheduler of torch's had put it there to see it called, which `Wrapped` tells
    own: Any = optimizer
    given: Any = type(own)
    own.__class__ = _class_of(given)
    own._mpips = run


def unwrap(optimizer: Optimizer) -> None:
    """Give the optimizer its own class back."""
    if isinstance(optimizer, Wrapped):
        own: Any = optimizer
        own.__class__ = kind(optimizer)
        del own._mpips


def by_number(tree: dict[str, Any], optimizer: Optimizer, names: dict[torch.Tensor, str]) -> dict[int, Any]:
    """A checkpoint's optimizer state, by name, keyed as `state_dict` keys it.

    Args:
        tree: name -> state.
        optimizer: the script's.
        names: the names of its parameters.
    """
    order = [names.get(p) for group in optimizer.param_groups for p in group["params"]]
    return {number: dict(tree[name]) for number, name in enumerate(order) if name in tree}
