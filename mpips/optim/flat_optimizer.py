"""An optimizer and the weights it steps on: the server's, and each worker's in modes with local steps.

A model in float32 or float64 is stepped in place. One in float16 or bfloat16 has float32 master weights here, whose gradients
are the push message itself. The script's own object stays the script's: what steps is a twin of it, wherever it can be made.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpips.config import ConfigError
from mpips.model.flat import unwrap
from mpips.model.message import Replica
from mpips.optim import snapshot
from mpips.optim.joint import Joint

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")  # run where the script calls step


def kind(optimizer: Optimizer) -> type[Optimizer]:
    """The class that the script gave it; after `connect` the script's object has one derived from that."""
    return getattr(type(optimizer), "given_class", type(optimizer))


def made(optimizer: Optimizer | MakeOptimizer, model: nn.Module) -> Optimizer:
    """The optimizer, made of the model's trained parameters if a function was given."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    return optimizer([p for p in unwrap(model).parameters() if p.requires_grad])


class FlatOptimizer:
    """A `torch.optim` optimizer on the flat weights.

    Args:
        replica: the model's flat buffers.
        optimizer: an optimizer of the model's own parameters, with groups as the user likes, or a function from a list of
            parameters to one.
        masters: whether it steps float32 masters of a model of 16 bits; without, it is there to be taken to pieces.
        own: whether it is a worker's own: it steps the model's weights, where they are not those in the pull message.

    Attributes:
        torch: what steps. Of a class of torch's a twin of the optimizer given, else that itself.
        weights: the parameters that are stepped: the model's, or their float32 masters.
        saved: masters of a checkpoint that has been put back.

    Raises:
        ConfigError: an optimizer of other parameters than the model's, or that cannot step here.
    """

    def __init__(self, replica: Replica, optimizer: Optimizer | MakeOptimizer, masters: bool = True, own: bool = False) -> None:
        self.replica, self._own = replica, own
        self.saved: dict[str, Tensor] = {}
        self.weights = replica.flat.parameters if replica.wire_is_grad or not masters else self._masters()
        self.names: dict[Tensor, str] = {p: s.name for p, s in zip(self.weights, replica.flat.slots, strict=True)}
        self.rebind()
        self.torch = self._adopt(optimizer) if isinstance(optimizer, Optimizer) else optimizer(list(self.weights))
        self._check_own()

    def give_up(self) -> None:
        """It has been taken to pieces, which have the masters now."""
        self.weights, self.names, self.saved = [], {}, {}
        self._whole = torch.empty(0)

    def rebind(self) -> None:
        """The push message lies elsewhere now."""
        gradients = self.replica.push.gradients
        self._grads = self.replica.flat.views_of(gradients)
        self._clipped = [grad for _, grad in self.replica.flat.named(gradients)]  # not the script's, which `clipping` averages

    @property
    def lr(self) -> float:
        """The first group's learning rate."""
        return float(self.torch.param_groups[0]["lr"])

    def _masters(self) -> list[nn.Parameter]:
        flat = self.replica.flat
        self._whole = flat.weights.to(self.replica.push.message.dtype)
        return [nn.Parameter(view) for _, view in flat.named(self._whole)]

    def _adopt(self, given: Optimizer) -> Optimizer:
        """A twin of the script's optimizer, on the masters where there are any."""
        if isinstance(given, Joint):
            return Joint([self._adopt(part) for part in given.parts], step_once)
        ours = dict(zip(self.replica.flat.parameters, self.weights, strict=True))
        frozen = set(self.replica.flat.frozen.values())
        in_place = self.weights is self.replica.flat.parameters
        if in_place and not _is_torchs(given):  # it may hold its parameters, or another optimizer, in ways of its own
            for group in given.param_groups:
                group["params"] = [p for p in group["params"] if p not in frozen]
            return given
        groups = [{**g, "params": [ours.get(p, p) for p in g["params"] if p not in frozen]} for g in given.param_groups]
        twin = object.__new__(kind(given))
        vars(twin).update({k: v for k, v in vars(given).items() if k != "step"})  # which a scheduler may have put there
        twin.param_groups = groups
        for name in HOOKS:
            setattr(twin, name, OrderedDict())
        if isinstance(given, (torch.optim.LBFGS, torch.optim.SparseAdam)):  # which steps on the workers
            twin.state = defaultdict(dict)
        else:
            self._share_state(twin, given)
        return twin

    def take_state(self, given: Optimizer, which: int = 0) -> None:
        """Take over the state of the script's optimizer, the number `which` of several, which it has loaded."""
        twin = self.torch.parts[which] if isinstance(self.torch, Joint) else self.torch
        if twin is not given:
            self._share_state(twin, given)

    def _share_state(self, twin: Optimizer, given: Optimizer) -> None:
        """The twin's state is that of the optimizer given; masters have one of their own."""
        if self.weights is self.replica.flat.parameters:
            twin.state = given.state
            return
        twin.state = defaultdict(dict)
        for p, master in zip(self.replica.flat.parameters, self.weights, strict=True):
            if p in given.state:
                twin.state[master] = {k: _in_dtype(v, master.dtype) for k, v in given.state.pop(p).items()}

    def _check_own(self) -> None:
        known = {*self.names, *self.replica.flat.frozen.values()}
        strangers = [p for group in self.torch.param_groups for p in group["params"] if p not in known]
        if strangers:
            raise ConfigError(
                f"optimizer: given one with {len(strangers)} parameter(s) that are not the model's, allowed: an optimizer of "
                f"this model's parameters, or a function that makes one of the parameters it is given"
            )

    @property
    def whole(self) -> Tensor:
        """The weights that are stepped, `(numel,)`: the model's, or their float32 masters."""
        return self.replica.flat.weights if self.replica.wire_is_grad else self._whole

    def refresh(self, numbers: Sequence[int] | None = None) -> None:
        """The model's weights, or those of these parameters, have been changed by others: take them as they are."""
        flat = self.replica.flat
        if not self.replica.wire_is_grad:
            for slot in flat.slots if numbers is None else [flat.slots[number] for number in numbers]:
                self._whole[slot.span].copy_(flat.weights[slot.span])

    def step(self, present: Sequence[float], clip: float | None, scale: float = 1.0, times: float = 1.0) -> None:
        """One step with the gradients in the push message.

        Args:
            present: for each parameter how many workers have a gradient; without any it is passed over, as in PyTorch.
            clip: the largest global norm.
            scale: what the learning rates are multiplied by, in this step alone.
            times: what the gradients are multiplied by, before they are clipped.
        """
        if times != 1:
            self.replica.push.gradients.mul_(times)
        grads = self._grads if clip is None else self._clipped
        combined = [grad if seen else None for grad, seen in zip(grads, present, strict=True)]
        apart = [  # where the script has other gradients, on this rank, too
            (p, new, old) for p, new in zip(self.weights, combined, strict=True) if (old := p.grad) is not new
        ]
        for p, new, _ in apart:
            p.grad = new
        if clip is not None:
            nn.utils.clip_grad_norm_(self.weights, clip)
        self.move(scale)
        for p, _, old in apart:
            p.grad = old
        if not self.replica.wire_is_grad:
            (self.replica.flat if self._own else self.replica.pull).weights.copy_(self._whole)

    def adopt(self) -> None:
        """Take what is in the push message for the new weights."""
        self.whole.copy_(self.replica.push.gradients)
        if not self.replica.wire_is_grad:
            self.replica.pull.weights.copy_(self._whole)

    def skip(self) -> None:
        """No step is taken in this round."""

    def move(self, scale: float) -> None:
        """One step of the script's optimizer, the learning rates times `scale`."""
        if scale == 1:
            step_once(self.torch)
            return
        with self._scaled(scale):
            step_once(self.torch)

    @contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        """The learning rates are multiplied by `scale` in here."""
        rates = [group["lr"] for group in self.torch.param_groups]
        for group, rate in zip(self.torch.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        yield
        for group, rate in zip(self.torch.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and master weights for a checkpoint."""
        masters = {} if self.replica.wire_is_grad else dict(self.replica.flat.named(self._whole))
        return {"optimizer": snapshot.take_optimizer(self.torch, kind(self.torch).__name__, self.names), "masters": masters}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the model's weights have been put back before."""
        snapshot.put_optimizer(tree["optimizer"], self.torch, kind(self.torch).__name__, self.names)
        self.saved = tree["masters"]
        if self.replica.wire_is_grad:
            return
        self._whole.copy_(self.replica.flat.weights)
        masters = dict(self.replica.flat.named(self._whole))
        if self.saved or not self._own:  # a worker's own may begin at the server's weights
            snapshot.check_same("masters", masters, self.saved)
        for name, master in self.saved.items():
            masters[name].copy_(master)


def nested(optimizer: Optimizer) -> dict[str, Optimizer]:
    """The optimizers that this one wraps, by the names of its attributes, as SAM and Lookahead do."""
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, Optimizer)}


def unhooked(optimizer: Optimizer) -> Callable[..., Any]:
    """The class's own step, without the hooks that are run where the script calls `step`."""
    step: Any = kind(optimizer).step
    torchs = getattr(step, "__globals__", {}).get("__name__") == "torch.optim.optimizer"  # not somebody's around it
    bare: Callable[..., Any] = getattr(step, "__wrapped__", step) if torchs and getattr(step, "hooked", False) else step
    return bare


def evaluates(optimizer: Optimizer, closure: bool) -> bool:
    """Whether every worker takes its step, alike, and the server takes the weights.

    So it is where the loss may be evaluated several times, and where an optimizer's state lies in others that it wraps.
    """
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        return True  # whose gradients are what backward left, and of no other kind
    return not _is_torchs(optimizer) and (closure or bool(nested(optimizer)))


def _is_torchs(optimizer: Optimizer) -> bool:
    return kind(optimizer).__module__.startswith(("torch.optim.", "mpips."))


def step_once(optimizer: Optimizer) -> None:
    """One step; if it is torch's own and nobody looks on, without what is there for those who do: half of a small one.

    Hooks are run where the script calls `step`, not here.
    """
    step = kind(optimizer).step
    bare = _unwrapped(step)
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    if bare is None or profiled or optimizer.defaults.get("differentiable"):
        _step_alone(optimizer)
        return
    graded = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # what no_grad calls, at a tenth of its time
    try:
        bare(optimizer)
    finally:
        torch._C._set_grad_enabled(graded)


def _step_alone(optimizer: Optimizer) -> None:
    """A step without a closure, of a class that may need one.

    Raises:
        ConfigError: it does.
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
    """The step of a class of torch's without its wrappers; None of others, or if somebody else has wrapped it."""
    while step.__module__.startswith("torch.optim.") and hasattr(step, "__wrapped__"):
        if not step.__globals__["__name__"].startswith("torch."):
            return None
        step = step.__wrapped__
    return step if step.__module__.startswith("torch.optim.") else None


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
