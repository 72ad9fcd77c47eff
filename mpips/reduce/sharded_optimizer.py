"""An optimizer that steps on pieces of the flat buffer: those slices of the weights that this rank serves.

Elementwise optimizers give the same bits on pieces of a tensor as on all of it; others are cut between tensors, or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from mpips.comm import Communicator, broadcast_bytes
from mpips.model.flat import Slot
from mpips.model.layout import piece, pieces
from mpips.optim import snapshot
from mpips.optim.flat_optimizer import FlatOptimizer, kind
from mpips.optim.server_optimizer import FedAdagrad, FedAdam, FedYogi, SetWeights, SlowMo

ELEMENTWISE = {
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta),
    *(optim.RMSprop, optim.Rprop, optim.ASGD, SetWeights, FedAdam, FedYogi, FedAdagrad, SlowMo),
}
MASTER = "master"  # beside an optimizer's own state of a piece: its weights, where they are not the model's
BY_TENSOR = {getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)}


class Granularity(IntEnum):
    """Where an optimizer's parameters may be cut."""

    NOWHERE = 0  # it may look at all of them at once
    TENSORS = 1  # it treats each tensor by itself
    ELEMENTS = 2  # and each element


def where(optimizer: Optimizer) -> Granularity:
    """What is known of this optimizer: of its class itself, as a class derived from it may do anything."""
    if kind(optimizer) in ELEMENTWISE:
        return Granularity.ELEMENTS
    return Granularity.TENSORS if kind(optimizer) in BY_TENSOR else Granularity.NOWHERE


class ShardedOptimizer:
    """A `FlatOptimizer`, taken to pieces.

    Args:
        whole: the optimizer; it is given up.
        spans: the slices of the flat buffer to step.
        gradients: `(numel,)`, where its gradients will be.
        weights: gives a slice of the weights to step.
        masters: whether these are not the model's, but of higher precision.

    Attributes:
        torch: the script's optimizer; its parameters are the pieces.
    """

    def __init__(
        self,
        whole: FlatOptimizer,
        spans: Sequence[slice],
        gradients: Tensor,
        weights: Callable[[slice], Tensor] | None = None,
        masters: bool = False,
    ) -> None:
        self.torch, self._whole = whole.torch, whole
        self._weights, self._masters = weights or (lambda part: whole.whole[part]), masters
        self._slots: Sequence[Slot] = whole.replica.flat.slots
        self._spans, self._gradients, self._piece = spans, gradients, piece(gradients.device)
        number: dict[Tensor, int] = {p: n for n, p in enumerate(whole.weights)}
        self._groups = [[number[p] for p in group["params"]] for group in self.torch.param_groups]
        self._kept = {number[p]: state for p, state in self.torch.state.items()}
        self.torch.state.clear()
        self.torch.state = defaultdict(dict)  # no longer the script's optimizer's, whose parameters are whole
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
        """The pieces of one tensor: parameter, gradient, and which of its elements."""
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
        """The first group's learning rate."""
        return float(self.torch.param_groups[0]["lr"])

    def step(self, present: Sequence[float], factor: float, scale: float) -> None:
        """One step.

        Args:
            present: for each tensor how many workers have a gradient; without any it is passed over.
            factor: what the gradients are multiplied by first.
            scale: what the learning rates are multiplied by, in this step alone.
        """
        for n, cut in self._pieces.items():
            for p, gradient, _ in cut:
                p.grad = gradient.mul_(factor) if factor != 1 and present[n] else gradient if present[n] else None
        self._whole.move(scale)

    def adopt(self) -> None:
        """Take what is combined for the new weights."""
        for cut in self._pieces.values():
            for p, gradient, _ in cut:
                p.data.copy_(gradient)

    def spread(self, communicator: Communicator, leads: bool) -> None:
        """Every rank takes its pieces of the state that the optimizer of the one that `leads` had as a whole."""
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
        """The state of this rank's pieces, for the server: tensor -> first element -> the state's tensors and numbers."""
        return {
            str(n): {str(part.start): self._state(p) for p, _, part in cut}
            for n, cut in self._pieces.items()
            if self._masters or any(p in self.torch.state for p, _, _ in cut)
        }

    def _state(self, p: nn.Parameter) -> dict[str, Any]:
        state = self.torch.state.get(p, {})
        return {k: v for k, v in state.items() if v is not None} | ({MASTER: p.data} if self._masters else {})

    def state_dict(self, elsewhere: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """As `FlatOptimizer.state_dict`: the same, whoever served what.

        Args:
            elsewhere: what `own` gave on the other ranks.
        """
        members = [[self._slots[n].name for n in numbers] for numbers in self._groups]
        state: dict[str, Any] = {}
        masters: dict[str, Tensor] = {}
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
    """`(numel,)`, the elements as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _joined(slot: Slot, parts: list[Any]) -> Any:
    """The state of a whole tensor from that of its pieces; a number, which they have alike, from the first."""
    first = parts[0]
    if not isinstance(first, Tensor) or not first.dim():
        return first
    if len(parts) == 1 and first.shape != slot.shape:
        return first  # not of the tensor's shape: Adafactor's rows and columns
    whole = torch.empty_strided(slot.shape, slot.stride, dtype=first.dtype)
    if len(parts) == 1:
        return whole.copy_(first)  # in whichever order it lies: from another rank it comes row by row
    torch.cat([part.cpu() for part in parts], out=_in_order(whole))
    return whole
