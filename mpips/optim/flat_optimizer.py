"""A `torch.optim` optimizer on the flat weights: the server's, and each worker's own in modes with local steps.

A float32 or float64 model is stepped in place. A float16 or bfloat16 model has float32 master weights here, and the gradients
of the master weights are views of the push message. The script's own optimizer object is not changed: a twin of it takes the
steps, wherever a twin can be made.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpips.config import ConfigError
from mpips.model.flat import unwrap
from mpips.model.message import Replica
from mpips.optim import snapshot
from mpips.optim.foreign import is_torchs, kind, needs_its_own_step, step_once
from mpips.optim.joint import Joint

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)  # the wrapped optimizer runs these, where the script calls step


def made(optimizer: Optimizer | MakeOptimizer, model: nn.Module) -> Optimizer:
    """Return the optimizer. If a function was given, call it with the model's trainable parameters."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    return optimizer([p for p in unwrap(model).parameters() if p.requires_grad])


class FlatOptimizer:
    """A `torch.optim` optimizer that steps the flat weights.

    Args:
        replica: the model's flat buffers.
        optimizer: an optimizer of the model's own parameters, with any parameter groups, or a function from a list of
            parameters to an optimizer.
        masters: whether a 16-bit model gets float32 master weights. False for an optimizer that is about to be divided into
            slices (`reduce/sharded_optimizer.py`).
        own: whether a worker takes local steps with it. It then steps the model's weights instead of those in the pull message.

    Attributes:
        torch: the optimizer that takes the steps. A twin of the given optimizer if that is of a class of torch's or there are
            master weights, else the given optimizer itself.
        weights: the parameters that are stepped: the model's, or their float32 master weights.
        saved: the master weights of the checkpoint that was loaded last.

    Raises:
        ConfigError: the optimizer has parameters that are not the model's, or it cannot step here.
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
        """Release the master weights: the slices that this optimizer was divided into hold them now."""
        self.weights, self.names, self.saved = [], {}, {}
        self._whole = torch.empty(0)

    def rebind(self) -> None:
        """Make views of the push message's gradients again. Call after the push message has moved to other memory."""
        gradients = self.replica.push.gradients
        self._grads = self.replica.flat.views_of(gradients)
        self._clipped = [
            grad for _, grad in self.replica.flat.named(gradients)
        ]  # no views that the script holds: run/clipping.py would average those

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.torch.param_groups[0]["lr"])

    def _masters(self) -> list[nn.Parameter]:
        """Return float32 master weights, views of one new flat tensor."""
        flat = self.replica.flat
        self._whole = flat.weights.to(self.replica.push.message.dtype)
        return [nn.Parameter(view) for _, view in flat.named(self._whole)]

    def _adopt(self, given: Optimizer) -> Optimizer:
        """Return a twin of the script's optimizer; where a foreign class steps in place, the optimizer itself."""
        if isinstance(given, Joint):
            return Joint([self._adopt(part) for part in given.parts], step_once)
        stepped = dict(zip(self.replica.flat.parameters, self.weights, strict=True))
        frozen = set(self.replica.flat.frozen.values())
        in_place = self.weights is self.replica.flat.parameters
        on_workers = isinstance(given, (torch.optim.LBFGS, torch.optim.SparseAdam)) or (
            not self._own and needs_its_own_step(given)
        )
        # A foreign class may hold parameters or another optimizer anywhere.
        if in_place and not (is_torchs(given) or on_workers):
            for group in given.param_groups:
                group["params"] = [p for p in group["params"] if p not in frozen]
            return given
        groups = [{**g, "params": [stepped.get(p, p) for p in g["params"] if p not in frozen]} for g in given.param_groups]
        twin = object.__new__(kind(given))
        vars(twin).update({k: v for k, v in vars(given).items() if k != "step"})  # a scheduler may have put a step there
        twin.param_groups = groups
        for name in HOOKS:
            setattr(twin, name, OrderedDict())
        if on_workers:
            twin.state = defaultdict(dict)
        else:
            self._share_state(twin, given)
        return twin

    def take_state(self, given: Optimizer, which: int = 0) -> None:
        """Take over the state that the script's optimizer has just loaded.

        Args:
            given: the script's optimizer.
            which: its number, if the run has several optimizers.
        """
        twin = self.torch.parts[which] if isinstance(self.torch, Joint) else self.torch
        if twin is not given:
            self._share_state(twin, given)

    def _share_state(self, twin: Optimizer, given: Optimizer) -> None:
        """Let the twin use the given optimizer's state. With master weights, move the state to the twin and cast it."""
        if self.weights is self.replica.flat.parameters:
            twin.state = given.state
            return
        twin.state = defaultdict(dict)
        for p, master in zip(self.replica.flat.parameters, self.weights, strict=True):
            if p in given.state:
                twin.state[master] = {k: _in_dtype(v, master.dtype) for k, v in given.state.pop(p).items()}

    def _check_own(self) -> None:
        """Raise ConfigError if the optimizer has parameters that are not the model's."""
        known = {*self.names, *self.replica.flat.frozen.values()}
        strangers = [p for group in self.torch.param_groups for p in group["params"] if p not in known]
        if strangers:
            raise ConfigError(
                f"optimizer: given one with {len(strangers)} parameter(s) that are not the model's, allowed: an optimizer of "
                f"this model's parameters, or a function that makes one of the parameters it is given"
            )

    @property
    def whole(self) -> Tensor:
        """The flat weights that are stepped, `(numel,)`: the model's, or their float32 master weights."""
        return self.replica.flat.weights if self.replica.wire_is_grad else self._whole

    def refresh(self, numbers: Sequence[int] | None = None) -> None:
        """Copy the model's weights to the master weights, after something else has changed them.

        Args:
            numbers: the parameters that have changed; None for all.
        """
        flat = self.replica.flat
        if not self.replica.wire_is_grad:
            for slot in flat.slots if numbers is None else [flat.slots[number] for number in numbers]:
                self._whole[slot.span].copy_(flat.weights[slot.span])

    def step(self, present: Sequence[float], clip: float | None, scale: float = 1.0, times: float = 1.0) -> None:
        """Take one step with the gradients in the push message.

        Args:
            present: for each parameter, the number of workers with a gradient. A parameter without any is skipped, as in
                PyTorch.
            clip: the largest global norm of the gradients; None not to clip.
            scale: a factor on the learning rates, for this step only.
            times: a factor on the gradients, applied before they are clipped.
        """
        if times != 1:
            self.replica.push.gradients.mul_(times)
        grads = self._grads if clip is None else self._clipped
        replaced = [  # on this rank the script's own gradients may be in p.grad
            (p, new, old)
            for p, grad, seen in zip(self.weights, grads, present, strict=True)
            if (old := p.grad) is not (new := grad if seen else None)
        ]
        for p, new, _ in replaced:
            p.grad = new
        if clip is not None and any(present):
            nn.utils.clip_grad_norm_(self.weights, clip)
        step_once(self.torch, scale)
        for p, _, old in replaced:
            p.grad = old
        if not self.replica.wire_is_grad:
            (self.replica.flat if self._own else self.replica.pull).weights.copy_(self._whole)

    def adopt(self) -> None:
        """Take the contents of the push message as the new weights."""
        self.whole.copy_(self.replica.push.gradients)
        if not self.replica.wire_is_grad:
            self.replica.pull.weights.copy_(self._whole)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and the master weights, by parameter name, for a checkpoint."""
        masters = {} if self.replica.wire_is_grad else dict(self.replica.flat.named(self._whole))
        return {"optimizer": snapshot.take_optimizer(self.torch, kind(self.torch).__name__, self.names), "masters": masters}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. The model's weights must have been restored before."""
        parts = self.torch.parts if isinstance(self.torch, Joint) else [self.torch]
        states = [part.state for part in parts]
        snapshot.put_optimizer(tree["optimizer"], self.torch, kind(self.torch).__name__, self.names)
        for part, state in zip(parts, states, strict=True):  # torch makes new dicts, but the script's optimizer has these
            restored = dict(part.state)
            state.clear()
            state.update(restored)
            part.state = state
        self.saved = tree["masters"]
        if self.replica.wire_is_grad:
            return
        self._whole.copy_(self.replica.flat.weights)
        masters = dict(self.replica.flat.named(self._whole))
        if self.saved or not self._own:  # without saved masters a worker begins at the server's weights
            snapshot.check_same("masters", masters, self.saved)
        for name, master in self.saved.items():
            masters[name].copy_(master)


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` in `dtype` if it is a floating-point tensor, else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
