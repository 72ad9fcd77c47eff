"""A model's buffers (BatchNorm statistics, counters), under one explicit policy.

`mean`: after every round all ranks hold the samples-weighted mean of the float buffers and the first worker's integer ones.
`server`: after every round all ranks hold the server's. `local`: each rank keeps its own.
Non-persistent buffers, and bool ones (masks), count as constants: they do not travel with the rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpips.model.flat import LayoutError, clean, lay_out


class Buffers:
    """The persistent buffers of a module.

    Attributes:
        named: name -> buffer, all persistent ones; for checkpoints.
        names, tensors: those that travel with every round, in a fixed order.
        float_numel, integer_numel: elements of the travelling ones in the push message.
    """

    def __init__(self, model: nn.Module, policy: str, wire: torch.dtype) -> None:
        self.model, self.policy = model, policy
        persistent = model.state_dict(keep_vars=True).keys()
        kept = [name for name, _ in model.named_buffers() if name in persistent]
        self._paths = {clean(name): name for name in kept}
        moved = {n: b for n, b in self.named.items() if policy != "local" and b.dtype != torch.bool}
        self.names = list(moved)
        averaged = policy == "mean"
        self._floats = [n for n, b in moved.items() if averaged and b.dtype.is_floating_point]
        self._integers = [n for n, b in moved.items() if averaged and not b.dtype.is_floating_point]
        for name in self._floats + self._integers:
            self._check(name, wire)
        self._slots, self.float_numel = lay_out((n, moved[n]) for n in self._floats)
        self.integer_numel = sum(moved[n].numel() for n in self._integers)

    @property
    def named(self) -> dict[str, Tensor]:
        """Name -> buffer as it is now: user code may have replaced a tensor."""
        return {name: self.model.get_buffer(path) for name, path in self._paths.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The travelling buffers as they are now."""
        named = self.named
        return [named[name] for name in self.names]

    def write(self, floats: Tensor, limbs: Tensor, weight: float, first: bool) -> None:
        """A worker's buffers into its push message: floats times `weight`, integers from the first worker alone."""
        if not self.names:
            return
        named = self.named
        for slot in self._slots:
            view = slot.view(floats)  # multiplied in the wire's dtype: fp16 would overflow
            view.copy_(named[slot.name].detach()).mul_(weight) if weight else view.zero_()
        if first and self._integers:
            numbers = torch.cat([named[n].reshape(-1).to(torch.int64) for n in self._integers])
            limbs.copy_(numbers.view(torch.int16))

    def combine(self, floats: Tensor, limbs: Tensor, pull: list[Tensor]) -> None:
        """The combined push message into the pull message's buffers."""
        if not self.names:
            return
        targets = dict(zip(self.names, pull, strict=True))
        for slot in self._slots:
            targets[slot.name].copy_(slot.view(floats))
        if self._integers:
            numbers = limbs.to(torch.int16).view(torch.int64)
            sizes = [targets[n].numel() for n in self._integers]
            for name, value in zip(self._integers, torch.split(numbers, sizes), strict=True):
                targets[name].copy_(value.view(targets[name].shape))

    def load(self, tensors: list[Tensor]) -> None:
        """Travelling buffers into the model."""
        if not self.names:
            return
        for buffer, tensor in zip(self.tensors, tensors, strict=True):
            buffer.data.copy_(tensor)  # unseen by autograd, as BatchNorm's own updates are

    def store(self, tensors: list[Tensor]) -> None:
        """The model's travelling buffers into `tensors`."""
        for buffer, tensor in zip(self.tensors, tensors, strict=True):
            tensor.copy_(buffer.detach())  # a script may have asked for its gradient

    def _check(self, name: str, wire: torch.dtype) -> None:
        buffer = self.named[name]
        if buffer.dtype == torch.float64 and wire != torch.float64:
            raise LayoutError(
                f"buffer {name} is {buffer.dtype}, which a {wire} message cannot carry; "
                f'cast it, register it with persistent=False, or choose buffers="local"'
            )
