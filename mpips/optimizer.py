"""An optimizer, its LR scheduler and the weights they step on: the server's, and each worker's in modes with local steps.

A model in float32 or float64 is stepped in place. One in float16 or bfloat16 has float32 master weights here, whose gradients
are the push message itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mpips import snapshot
from mpips.config import ConfigError
from mpips.message import Replica

Scheduler = LRScheduler | ReduceLROnPlateau
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], Scheduler]


class FlatOptimizer:
    """A `torch.optim` optimizer on the flat weights.

    Args:
        replica: the model's flat buffers.
        optimizer: an optimizer of the model's own parameters, with groups as the user likes, or a function from a list of
            parameters to one.
        scheduler: a scheduler of that optimizer, or a function from an optimizer to one.
        masters: whether it steps float32 masters of a model of 16 bits; without, it is there to be taken to pieces.
        own: whether it is a worker's own: it steps the model's weights, where they are not those in the pull message.

    Attributes:
        weights: the parameters that are stepped: the model's, or their float32 masters.
        saved: masters of a checkpoint that has been put back.
    """

    def __init__(
        self,
        replica: Replica,
        optimizer: Optimizer | MakeOptimizer,
        scheduler: Scheduler | MakeScheduler | None,
        masters: bool = True,
        own: bool = False,
    ) -> None:
        self.replica, self._own = replica, own
        self.saved: dict[str, Tensor] = {}
        self.weights = replica.flat.parameters if replica.wire_is_grad or not masters else self._masters()
        self.names: dict[Tensor, str] = {p: s.name for p, s in zip(self.weights, replica.flat.slots, strict=True)}
        self.rebind()
        self.torch = self._adopt(optimizer) if isinstance(optimizer, Optimizer) else optimizer(list(self.weights))
        self._check_own()
        if isinstance(self.torch, torch.optim.LBFGS):
            raise ConfigError("optimizer: given LBFGS, allowed: optimizers that step without evaluating the loss again")
        if scheduler is not None and not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            scheduler = scheduler(self.torch)
        self.scheduler: Scheduler | None = scheduler
        if self.scheduler is not None and self.scheduler.optimizer is not self.torch:
            raise ConfigError("scheduler: given one of another optimizer, allowed: one built from the optimizer given here")

    def give_up(self) -> None:
        """It has been taken to pieces, which have the masters now."""
        self.weights, self.names, self.saved = [], {}, {}
        self._whole = torch.empty(0)

    def rebind(self) -> None:
        """The push message lies elsewhere now."""
        self._grads = [grad for _, grad in self.replica.flat.named(self.replica.push.gradients)]

    @property
    def lr(self) -> float:
        """The first group's learning rate."""
        return float(self.torch.param_groups[0]["lr"])

    def _masters(self) -> list[nn.Parameter]:
        flat = self.replica.flat
        self._whole = flat.weights.to(self.replica.push.message.dtype)
        return [nn.Parameter(view) for _, view in flat.named(self._whole)]

    def _adopt(self, given: Optimizer) -> Optimizer:
        """The user's optimizer, on the masters where there are any."""
        ours = dict(zip(self.replica.flat.parameters, self.weights, strict=True))
        frozen = set(self.replica.flat.frozen.values())
        for group in given.param_groups:
            group["params"] = [ours.get(p, p) for p in group["params"] if p not in frozen]
        for p, master in ours.items():
            if p is not master and p in given.state:
                given.state[master] = {k: _in_dtype(v, master.dtype) for k, v in given.state.pop(p).items()}
        return given

    def _check_own(self) -> None:
        strangers = [p for group in self.torch.param_groups for p in group["params"] if p not in self.names]
        if strangers:
            raise ConfigError(
                f"optimizer: given one with {len(strangers)} parameter(s) that are not the model's, allowed: an optimizer of "
                f"this model's parameters, or a function that makes one of the parameters it is given"
            )

    @property
    def whole(self) -> Tensor:
        """The weights that are stepped, `(numel,)`: the model's, or their float32 masters."""
        return self.replica.flat.weights if self.replica.wire_is_grad else self._whole

    def refresh(self) -> None:
        """The model's weights have been changed by others: take them as they are."""
        if not self.replica.wire_is_grad:
            self._whole.copy_(self.replica.flat.weights)

    def step(self, present: Sequence[float], clip: float | None, scale: float = 1.0) -> None:
        """One step with the gradients in the push message.

        Args:
            present: for each parameter how many workers have a gradient; without any it is passed over, as in PyTorch.
            clip: the largest global norm.
            scale: what the learning rates are multiplied by, in this step alone.
        """
        before = [p.grad for p in self.weights]  # not always views: the script calls zero_grad on this rank, too
        for p, grad, seen in zip(self.weights, self._grads, present, strict=True):
            p.grad = grad if seen else None
        if clip is not None:
            nn.utils.clip_grad_norm_(self.weights, clip)
        self.move(scale)
        for p, own in zip(self.weights, before, strict=True):
            p.grad = own
        if not self.replica.wire_is_grad:
            (self.replica.flat if self._own else self.replica.pull).weights.copy_(self._whole)

    def skip(self) -> None:
        """No step is taken in this round."""

    def move(self, scale: float) -> None:
        """One step of the script's optimizer, the learning rates times `scale`."""
        if scale == 1:
            _step(self.torch)
            return
        with self._scaled(scale):
            _step(self.torch)

    @contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        """The learning rates are multiplied by `scale` in here."""
        rates = [group["lr"] for group in self.torch.param_groups]
        for group, rate in zip(self.torch.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        yield
        for group, rate in zip(self.torch.param_groups, rates, strict=True):
            group["lr"] = rate

    def schedule(self, value: float | None = None) -> None:
        """One step of the scheduler; `value` is what ReduceLROnPlateau watches."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if value is not None:
                self.scheduler.step(value)
        elif self.scheduler is not None:
            with warnings.catch_warnings():  # a server beside workers with steps of their own keeps their rate and never steps
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def tree(self) -> dict[str, Any]:
        """Optimizer, scheduler and master weights for a checkpoint."""
        masters = {} if self.replica.wire_is_grad else dict(self.replica.flat.named(self._whole))
        return self.wrap(snapshot.take_optimizer(self.torch, self.names), masters)

    def wrap(self, optimizer: dict[str, Any], masters: dict[str, Tensor]) -> dict[str, Any]:
        """`tree`, with the optimizer's part and the masters given."""
        return {"optimizer": optimizer, "scheduler": self._scheduler_tree(), "masters": masters}

    def _scheduler_tree(self) -> dict[str, str]:
        if self.scheduler is None:
            return {}
        return {"class": type(self.scheduler).__name__, "state": snapshot.to_json(self.scheduler.state_dict())}

    def put(self, tree: dict[str, Any]) -> None:
        """Take back what `tree` gave; the model's weights have been put back before."""
        snapshot.put_optimizer(tree["optimizer"], self.torch, self.names)
        saved, ours = tree["scheduler"].get("class", "none"), self._scheduler_tree().get("class", "none")
        if saved != ours:
            raise snapshot.SnapshotError(f"the checkpoint has scheduler {saved}, this run {ours}; give the one of that run")
        if self.scheduler is not None:
            self.scheduler.load_state_dict(snapshot.from_json(tree["scheduler"]["state"]))
        self.saved = tree["masters"]
        if not self.replica.wire_is_grad:
            self._whole.copy_(self.replica.flat.weights)
            for name, master in self.replica.flat.named(self._whole):
                master.copy_(tree["masters"].get(name, master))


def _step(optimizer: Optimizer) -> None:
    """One step; if it is torch's own and nobody looks on, without what is there for those who do: half of a small one."""
    bare = _unwrapped(type(optimizer).step)
    hooked = (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
    counted = "step" in vars(optimizer)  # by a scheduler
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    if bare is None or hooked or counted or profiled or optimizer.defaults.get("differentiable"):
        optimizer.step()
        return
    graded = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # what no_grad calls, at a tenth of its time
    try:
        bare(optimizer)
    finally:
        torch._C._set_grad_enabled(graded)


@cache
def _unwrapped(step: Any) -> Callable[[Optimizer], object] | None:
    """The step of a class of torch's without its wrappers; None of others, or if somebody else has wrapped it."""
    while step.__module__.startswith("torch.optim.") and hasattr(step, "__wrapped__"):
        if not step.__globals__["__name__"].startswith("torch."):
            return None
        step = step.__wrapped__
    return step if step.__module__.startswith("torch.optim.") else None


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
