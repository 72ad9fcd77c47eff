"""A model's buffers (BatchNorm statistics, counters), under one of three policies.

`mean`: after every round all ranks hold the samples-weighted mean of the float buffers and the first worker's integer buffers.
`server`: after every round all ranks hold the server's buffers. `local`: each rank keeps its own. Non-persistent buffers and
bool buffers (masks) count as constants and are not part of a round's messages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mpips.model.flat import LayoutError, clean, lay_out

STATISTICS = (nn.modules.batchnorm._NormBase, parametrizations._SpectralNorm)  # whose buffers a mean over workers suits
LIMBS = 4  # 16-bit pieces of an int64


class Buffers:
    """The persistent buffers of a module.

    Attributes:
        named: name -> buffer, for all persistent buffers; used for checkpoints.
        names, tensors: the buffers that travel in every round, in a fixed order.
        float_numel, limb_numel: the number of elements of the push message for floats, and for integers: four 16-bit limbs for
            each, and one element that says that they are there.
    """

    def __init__(self, model: nn.Module, policy: str, wire: torch.dtype) -> None:
        self.model, self.policy = model, policy
        persistent = model.state_dict(keep_vars=True).keys()
        paths = [name for name, _ in model.named_buffers() if name in persistent]
        self._paths = {clean(name): name for name in paths}
        moved = {n: b for n, b in self.named.items() if policy != "local" and b.dtype != torch.bool}
        self.names = list(moved)
        averaged = policy == "mean"
        self._floats = [n for n, b in moved.items() if averaged and b.dtype.is_floating_point]
        self._integers = [n for n, b in moved.items() if averaged and not b.dtype.is_floating_point]
        for name in self._floats + self._integers:
            self._check(name, wire)
        self._slots, self.float_numel = lay_out((n, moved[n]) for n in self._floats)
        numel = sum(moved[n].numel() for n in self._integers)
        self.limb_numel = LIMBS * numel + 1 if numel else 0

    @property
    def named(self) -> dict[str, Tensor]:
        """Name -> present buffer. User code may have replaced a tensor."""
        return {name: self.model.get_buffer(path) for name, path in self._paths.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The present travelling buffers, in the order of `names`."""
        named = self.named
        return [named[name] for name in self.names]

    def write(self, floats: Tensor, limbs: Tensor, weight: float, first: bool) -> None:
        """Write a worker's buffers to its push message: floats times `weight`, integers only if this is the `first` worker."""
        if not self.names:
            return
        named = self.named
        for slot in self._slots:
            view = slot.view(floats)  # multiplied in the wire's dtype: fp16 would overflow
            view.copy_(named[slot.name].detach()).mul_(weight) if weight else view.zero_()
        if first and self._integers:
            numbers = torch.cat([named[n].reshape(-1).to(torch.int64) for n in self._integers])
            limbs[:-1].copy_(numbers.view(torch.int16))
            limbs[-1] = 1

    def combine(self, floats: Tensor, limbs: Tensor, pull: list[Tensor]) -> None:
        """Copy the combined buffers of the push message to the pull message's buffers.

        Integers stay if nobody has written them, as the worker that does has died.
        """
        targets = dict(zip(self.names, pull, strict=True))
        for slot in self._slots:
            targets[slot.name].copy_(slot.view(floats))
        if len(limbs) and limbs[-1]:
            numbers = limbs[:-1].to(torch.int16).view(torch.int64)
            sizes = [targets[n].numel() for n in self._integers]
            for name, value in zip(self._integers, torch.split(numbers, sizes), strict=True):
                targets[name].copy_(value.view(targets[name].shape))

    def own(self, pulled: list[Tensor]) -> dict[str, Tensor]:
        """Return the buffers by name that are this rank's own: by policy, or because they have changed since the last pull."""
        if self.policy == "local":
            return self.named
        return {n: b for n, b, pull in zip(self.names, self.tensors, pulled, strict=True) if not torch.equal(b, pull)}

    def averaged(self, pulled: list[Tensor]) -> str:
        """Return the name of a buffer that is averaged, has changed since the last pull, and may be no statistics; else ""."""
        changed = self.own(pulled)
        for name in self._floats:
            owner = self.model.get_submodule(self._paths[name].rpartition(".")[0])
            if name in changed and not isinstance(owner, STATISTICS):
                return name
        return ""

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy buffers from `tensors`, by name, to the model. A buffer that has another shape by now stays."""
        for name, buffer in self.named.items():
            if name in tensors and buffer.shape == tensors[name].shape:
                buffer.detach().copy_(tensors[name])

    def load(self, tensors: list[Tensor], integers: bool = True) -> None:
        """Copy travelling buffers from `tensors` to the model, with or without those of integers."""
        for buffer, tensor in zip(self.tensors, tensors, strict=True):
            if integers or buffer.dtype.is_floating_point:
                buffer.data.copy_(tensor)  # through .data: autograd does not see BatchNorm's own updates either

    def store(self, tensors: list[Tensor]) -> None:
        """Copy the model's travelling buffers to `tensors`."""
        for buffer, tensor in zip(self.tensors, tensors, strict=True):
            tensor.copy_(buffer.detach())  # the script may have set requires_grad

    def _check(self, name: str, wire: torch.dtype) -> None:
        """Raise LayoutError if a message of dtype `wire` cannot hold the buffer exactly."""
        buffer = self.named[name]
        if buffer.dtype == torch.float64 and wire != torch.float64:
            raise LayoutError(
                f"buffer {name} is {buffer.dtype}, which a {wire} message cannot carry; "
                f'cast it, register it with persistent=False, or choose buffers="local"'
            )
