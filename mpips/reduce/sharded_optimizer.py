"""The sharded optimizer: steps the slices of the flat buffer that this rank serves.

Elementwise optimizers give the same bits on pieces of a tensor as on the whole. Others are sharded between tensors, or not at
all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from mpips.checkpoint import Parts
from mpips.comm import Communicator, broadcast_bytes
from mpips.model.flat import Slot
from mpips.model.layout import piece, pieces
from mpips.optim import snapshot
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.optim.foreign import kind, step_once
from mpips.optim.server_optimizer import FedAdagrad, FedAdam, FedYogi, SetWeights, SlowMo

ELEMENTWISE = {
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta),
    *(optim.RMSprop, optim.Rprop, optim.ASGD, SetWeights, FedAdam, FedYogi, FedAdagrad, SlowMo),
}
MASTER = "master"  # the key of a piece's master weights, beside the optimizer's own state
BY_TENSOR = {getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)}


class Granularity(IntEnum):
    """How finely an optimizer's parameters may be cut."""

    NOWHERE = 0  # the optimizer may use all tensors at once
    TENSORS = 1  # the optimizer steps each tensor by itself
    ELEMENTS = 2  # the optimizer steps each element by itself


def where(optimizer: Optimizer) -> Granularity:
    """Return how finely this optimizer's parameters may be cut, by its exact class, as a derived class may do anything."""
    if kind(optimizer) in ELEMENTWISE:
        return Granularity.ELEMENTS
    return Granularity.TENSORS if kind(optimizer) in BY_TENSOR else Granularity.NOWHERE


class ShardedOptimizer:
    """A `FlatOptimizer`, reduced to the slices of one rank.

    Args:
        whole: the optimizer, which must not be used any more.
        spans: the slices of the flat buffer to step.
        gradients: `(numel,)`, the buffer of the combined gradients.
        weights: returns the weights to step of a slice; by default the flat optimizer's.
        masters: whether these are float32 master weights instead of the model's.

    Attributes:
        torch: the script's optimizer; its parameters are the pieces of tensors that this rank steps.
    """

    def __init__(
        self,
        whole: FlatOptimizer,
        spans: Sequence[slice],
        gradients: Tensor,
        weights: Callable[[slice], Tensor] | None = None,
        masters: bool = False,
    ) -> None:
        self.torch = whole.torch
        self._weights, self._masters = weights or (lambda part: whole.whole[part]), masters
        self._slots: Sequence[Slot] = whole.replica.flat.slots
        self._spans, self._gradients, self._piece = spans, gradients, piece(gradients.device)
        number: dict[Tensor, int] = {p: n for n, p in enumerate(whole.weights)}
        self._groups = [[number[p] for p in group["params"]] for group in self.torch.param_groups]
        self._kept = {number[p]: state for p, state in self.torch.state.items() if p in number}  # Adagrad has frozen ones' too
        for p in number:
            self.torch.state.pop(p, None)
        self.torch.state = defaultdict(dict)  # a new dict: the script's optimizer keeps its own, for whole parameters
        if masters:
            for n, slot in enumerate(self._slots):
                if slot.name in whole.saved:
                    self._kept.setdefault(n, {})[MASTER] = whole.saved[slot.name]
        self._pieces: dict[int, list[tuple[nn.Parameter, Tensor, slice]]] = {}
        for group, numbers in zip(self.torch.param_groups, self._groups, strict=True):
            for n in numbers:
                self._pieces[n] = list(self._cut(self._slots[n]))
            group["params"] = [p for n in numbers for p, _, _ in self._pieces[n]]
        whole.give_up()

    def _cut(self, slot: Slot) -> Iterator[tuple[nn.Parameter, Tensor, slice]]:
        """Yield this rank's pieces of one tensor, each as a parameter, its gradient, and its slice of the tensor's elements."""
        for span in self._spans:
            yield from self._cut_by(slot, max(span.start, slot.offset), min(span.stop, slot.offset + slot.numel))

    def _cut_by(self, slot: Slot, start: int, stop: int) -> Iterator[tuple[nn.Parameter, Tensor, slice]]:
        if (start, stop) == (slot.offset, slot.offset + slot.numel) and (
            slot.numel <= self._piece or where(self.torch) < Granularity.ELEMENTS
        ):
            own = slot.shaped(self._weights(slice(start, stop)))
            yield nn.Parameter(own), slot.view(self._gradients), slice(0, slot.numel)
            return
        for part in pieces(slice(start, stop), self._piece):
            own, inside = self._weights(part), slice(part.start - slot.offset, part.stop - slot.offset)
            yield nn.Parameter(own), self._gradients[part], inside

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.torch.param_groups[0]["lr"])

    def step(self, present: Sequence[float], factor: float, scale: float) -> None:
        """Take one step.

        Args:
            present: for each tensor, the number of workers with a gradient; a tensor with 0 is skipped.
            factor: the factor of the gradients.
            scale: the factor of the learning rates, in this step alone.
        """
        for n, cut in self._pieces.items():
            for p, gradient, _ in cut:
                p.grad = gradient.mul_(factor) if factor != 1 and present[n] else gradient if present[n] else None
        step_once(self.torch, scale)

    def adopt(self) -> None:
        """Take the combined contribution as the new weights."""
        for cut in self._pieces.values():
            for p, gradient, _ in cut:
                p.data.copy_(gradient)

    def spread(self, communicator: Communicator, leads: bool) -> None:
        """Scatter the state of the leader's whole optimizer; each rank keeps its own pieces.

        Args:
            communicator: this rank's end.
            leads: whether this rank has the whole state.
        """
        kinds = {str(n): {k: _kind(v) for k, v in state.items()} for n, state in self._kept.items()}
        told = snapshot.from_json(broadcast_bytes(communicator, snapshot.to_json(kinds).encode()).decode())
        for n, entries in told.items():
            for key, (dtype, shape, value) in entries.items():
                if dtype is None:
                    self._put(int(n), key, value)
                    continue
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                if leads:
                    tensor.copy_(self._kept[int(n)][key])
                communicator.broadcast(tensor.view(-1))
                self._put(int(n), key, tensor.to(self._gradients.device if value == "cuda" else value))
        self._kept.clear()

    def _put(self, n: int, key: str, value: Any) -> None:
        slot = self._slots[n]
        for p, _, part in self._pieces.get(n, []):
            mine = value
            if isinstance(value, Tensor):
                if value.numel() == slot.numel and value.dim():
                    room = torch.empty_strided(slot.shape, slot.stride, dtype=value.dtype, device=value.device).copy_(value)
                    mine = _in_order(room)[part].clone()
                    mine = mine.as_strided(p.shape, p.stride()) if mine.numel() == p.numel() else mine
                else:
                    mine = value.clone()
            if key == MASTER:
                p.data.copy_(mine)
            else:
                self.torch.state[p][key] = mine

    def own(self) -> dict[str, Any]:
        """Return the state of this rank's pieces: a tensor's index -> a piece's first element -> its tensors and numbers."""
        return {
            str(n): {str(part.start): self._state(p) for p, _, part in cut}
            for n, cut in self._pieces.items()
            if self._masters or any(p in self.torch.state for p, _, _ in cut)
        }

    def _state(self, p: nn.Parameter) -> dict[str, Any]:
        state = self.torch.state.get(p, {})
        return {k: v for k, v in state.items() if v is not None} | ({MASTER: p.data} if self._masters else {})

    def state_dict(self, elsewhere: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return the whole optimizer's state, as `FlatOptimizer.state_dict`; it does not depend on which rank serves what.

        A tensor that several ranks have parts of is a `Parts`.

        Args:
            elsewhere: what `own` returned on the other ranks.
        """
        members = [[self._slots[n].name for n in numbers] for numbers in self._groups]
        state: dict[str, Any] = {}
        masters: dict[str, Tensor | Parts] = {}
        for n, slot in enumerate(self._slots):
            parts = {int(at): kept for own in (self.own(), *elsewhere) for at, kept in own.get(str(n), {}).items()}
            if parts:
                ordered = [parts[at] for at in sorted(parts)]
                whole = {k: _joined(slot, [kept[k] for kept in ordered]) for k in ordered[0]}
                if self._masters:
                    masters[slot.name] = whole.pop(MASTER)
                if whole:
                    state[slot.name] = whole
        name = kind(self.torch).__name__
        return {"optimizer": snapshot.optimizer_tree(self.torch, name, members, state), "masters": masters}


def _kind(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), list(value.shape), value.device.type]
    return [None, None, value]


def _in_order(tensor: Tensor) -> Tensor:
    """Return the tensor's elements in the order of memory, of shape `(numel,)`."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _joined(slot: Slot, parts: list[Any]) -> Any:
    """Return the state of a whole tensor, given that of its pieces; a number, which all pieces share, is the first piece's."""
    first = parts[0]
    if not isinstance(first, Tensor) or not first.dim():
        return first
    if len(parts) == 1 and first.shape != slot.shape:
        return first  # of another shape than the tensor, such as Adafactor's rows and columns
    if torch.empty_strided(slot.shape, slot.stride, device="meta").is_contiguous():
        return Parts(tuple(part.cpu().reshape(-1) for part in parts), tuple(slot.shape))
    whole = torch.empty_strided(slot.shape, slot.stride, dtype=first.dtype)
    if len(parts) == 1:
        return whole.copy_(first)  # in any memory order: from another rank it comes row by row
    torch.cat([part.cpu() for part in parts], out=_in_order(whole))
    return whole
