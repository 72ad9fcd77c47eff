"""A rank's part of a round in memory that ranks share: it combines and steps the slices that it serves.

    everyone   combine                                  its slices of all push messages become one, in the leader's
    leader     faults, then step or skip                judges, tells the others, steps its own slices
    others     follow                                   do as they are told

The leader is the server's rank. Where it serves all slices, `follow` is empty and nothing is told.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpips.combine import WEIGHT, prepare
from mpips.config import Config
from mpips.exchange import Exchange
from mpips.exchange.room import Room
from mpips.message import Replica
from mpips.optimizer import Average, FlatOptimizer
from mpips.pieces import Cut, Pieces, where
from mpips.plan import SMALL, divide, pieces
from mpips.rule import Mean, Rule
from mpips.rule.mean import NormClip

TAKE, FACTOR, SCALE, SETTINGS = range(4)  # of the verdict


class Slices:
    """This rank's slices.

    Args:
        room: where the messages lie.
        replica: the model in them.
        rule: combines; needs "sum".
        optimizer: steps this rank's slices; None where it serves none.
        config: the settings.
    """

    def __init__(
        self, room: Room, replica: Replica, rule: Rule, optimizer: Pieces | FlatOptimizer | Average | None, config: Config
    ) -> None:
        self.room, self.replica, self.config = room, replica, config
        self._push, self._rule, self._optimizer = replica.push, rule, optimizer
        self._weights: list[float] | None = None
        self._factors: tuple[list[float], float] = [], 0.0
        self._faulty = False
        self._faults = torch.zeros(lines(replica, room.size), dtype=torch.float64)
        own = optimizer.settings() if isinstance(optimizer, Pieces) else []
        self._verdict = torch.zeros(SETTINGS + len(own), dtype=torch.float64)

    @property
    def plan(self) -> str:
        """The plan's name."""
        return "sharded" if self.room.together else "root"

    def combine(self) -> None:
        """All push messages are written: bring this rank's slices together."""
        self._weights = None
        if self._faulty:
            self._faults.zero_()
        self._faulty = False
        if type(self._rule).prepare is not Rule.prepare:
            prepare(self.room.rank, self._push, self._rule)
        self.room.combine(self._push.tail_at, self._push.heard.message, self._apply)

    def _apply(self, part: slice, rows: Sequence[Tensor]) -> None:
        """The mean of one slice."""
        if self._weights is None:
            self._weigh()
        assert self._weights is not None
        behind = part.start >= self._push.gradients.numel()
        factors, whole = self._factors
        if behind:  # BatchNorm's statistics, which are multiplied already
            factors, whole = [float(weight > 0) for weight in self._weights], sum(self._weights)
        if not whole:
            return
        out = _sum(rows, factors, self.config.deterministic)
        if whole != 1:
            out.div_(whole)
        if not behind and not math.isfinite(torch.dot(out, out).item()):
            self._note_faults(part, rows)

    def _weigh(self) -> None:
        """What each rank's gradient is multiplied by, and their sum divided by; of equal weights only who has one matters."""
        self._weights = weights = self._push.heard.rows[:, WEIGHT].tolist()
        if not self.config.deterministic and len({weight for weight in weights if weight}) == 1:
            weights = [float(weight > 0) for weight in weights]
        self._factors = weights, sum(weights)

    def _note_faults(self, part: slice, rows: Sequence[Tensor]) -> None:
        """Whose part of the sum is not finite, and in which tensor; the leader's, whose row holds the sum, if no other's."""
        assert self._weights is not None
        self._faulty = True
        guilty = [k for k in range(1, len(rows)) if self._weights[k] and not rows[k].isfinite().all()] or [0]
        for k in guilty:
            bad = (~rows[k].isfinite()).nonzero()
            if not len(bad):
                continue  # large, but not infinite
            at = part.start + int(bad[0])
            slot = max(i for i, s in enumerate(self.replica.flat.slots) if s.offset <= at)
            if not self._faults[k]:
                self._faults[k] = 1 + slot

    def faults(self) -> dict[int, int]:
        """At the leader: which ranks' contributions are not finite, with the index of a tensor."""
        if not self.room.together and not self._faulty:
            return {}
        table = self.room.report(self._faults)[:, : self.room.size]
        if not table.any():
            return {}
        table = torch.where(table > 0, table, math.inf)
        return {rank: int(slot) - 1 for rank, slot in enumerate(table.amin(0).tolist()) if slot < math.inf}

    def step(self, present: Sequence[float], clip: float | None, scale: float = 1.0) -> None:
        """At the leader: step, and have the others step; see `FlatOptimizer.step`."""
        if not isinstance(self._optimizer, Pieces):
            assert self._optimizer
            self._optimizer.step(present, clip, scale)
            return
        self._tell(1.0, scale)
        factor = 1.0
        if clip is not None:
            norms = self.room.report(self._norms(present)).sum(0).tolist()
            factor = _factor([norm for norm, seen in zip(norms, present, strict=False) if seen], clip, self._push.message)
            self._tell(1.0, scale, factor)
        self._optimizer.step(present, factor, scale)

    def skip(self) -> None:
        """At the leader: no step is taken in this round."""
        if isinstance(self._optimizer, Pieces):
            self._tell(0.0, 1.0)

    def _tell(self, take: float, scale: float, factor: float = 1.0) -> None:
        assert isinstance(self._optimizer, Pieces)
        self._verdict.copy_(torch.tensor([take, factor, scale, *self._optimizer.settings()], dtype=torch.float64))
        self.room.verdict(self._verdict)

    def follow(self) -> None:
        """On the other ranks: do as the leader judges."""
        if not isinstance(self._optimizer, Pieces):
            return
        self.room.report(self._faults)
        self.room.verdict(self._verdict)
        if not self._verdict[TAKE]:
            return
        present = self._push.heard.presence.tolist()
        if self.config.clip is not None:
            self.room.report(self._norms(present))
            self.room.verdict(self._verdict)
        _, factor, scale, *settings = self._verdict.tolist()
        self._optimizer.set(settings)
        self._optimizer.step(present, factor, scale)

    def _norms(self, present: Sequence[float]) -> Tensor:
        """The norms of those combined gradients that this rank measures, whole tensors, as `clip_grad_norm_` measures them."""
        norms, gradients = torch.zeros_like(self._faults), self.room.combined
        middle = [slot.offset + slot.numel // 2 for slot in self.replica.flat.slots]
        for n, slot in enumerate(self.replica.flat.slots):
            if present[n] and any(span.start <= middle[n] < span.stop for span in self.room.spans):
                norms[n] = torch.linalg.vector_norm(slot.view(gradients))
        return norms

    def publish(self, control: Any = None) -> None:
        """The weights are stepped; the leader adds what else it has to say."""

        def fill() -> None:
            if control is not None:
                self.replica.pull.control = control

        self.room.publish(fill)

    @property
    def lr(self) -> float:
        """The first group's learning rate."""
        assert self._optimizer
        return self._optimizer.lr

    @property
    def torch(self) -> Any:
        """The script's optimizer."""
        assert self._optimizer
        return self._optimizer.torch

    def schedule(self, value: float | None = None) -> None:
        """See `FlatOptimizer`."""
        assert self._optimizer
        self._optimizer.schedule(value)

    def own(self) -> dict[str, Any]:
        """The optimizer's state on this rank, for the server's checkpoint."""
        return self._optimizer.own() if isinstance(self._optimizer, Pieces) else {}

    def tree(self, elsewhere: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The whole optimizer, given the other ranks' `own`."""
        assert self._optimizer
        return self._optimizer.tree(elsewhere) if isinstance(self._optimizer, Pieces) else self._optimizer.tree()

    def put(self, tree: dict[str, Any]) -> None:
        """Nothing is put back once slices are served."""
        raise RuntimeError("a checkpoint is put back before the first round")


def _sum(rows: Sequence[Tensor], factors: Sequence[float], exact: bool) -> Tensor:
    """The sum of the rows times their factors, in their order, in the memory of the first.

    Args:
        rows: of factor 0 may hold anything.
        factors: one at least is not 0.
        exact: round each product before it is added, as when every rank multiplies its own.
    """
    out, begun = rows[0], False
    for row, factor in zip(rows, factors, strict=True):
        if not factor:
            continue
        if not begun:
            begun = True
            if factor != 1:
                torch.mul(row, factor, out=out)
            elif row is not out:
                out.copy_(row)
        elif exact and factor != 1:
            out.add_(row * factor)
        else:
            out.add_(row, alpha=factor)
    return out


def _factor(norms: list[float], clip: float, like: Tensor) -> float:
    """What `clip_grad_norm_` multiplies by, computed as it does."""
    total = torch.linalg.vector_norm(torch.tensor(norms, dtype=like.dtype))
    return float(torch.clamp(clip / (total + 1e-6), max=1.0))


def lines(replica: Replica, ranks: int) -> int:
    """How many numbers a rank reports at most: one for each rank, or for each tensor."""
    return max(ranks, len(replica.flat.slots))


def settle(
    exchange: Exchange, replica: Replica, config: Config, rule: Rule, optimizer: FlatOptimizer | Average | None, gradients: bool
) -> Slices | None:
    """Move the messages into memory that the ranks share, if they do, and deal out the slices; all ranks call this.

    Args:
        exchange: this rank's end.
        replica: has the server's weights on every rank.
        config: the settings.
        rule: combines.
        optimizer: the script's, on this rank; None if it was given none.
        gradients: whether workers push gradients, in rounds, with the model at the server's weights all the time.

    Returns:
        None where MPI is to carry the messages.
    """
    if exchange.size == 1 or not (gradients and config.shared_memory):
        return None
    shares = type(rule) in (Mean, NormClip) and _shareable(replica)
    cut = where(optimizer.torch) if isinstance(optimizer, FlatOptimizer) else Cut.NOWHERE
    kind = type(optimizer.torch).__qualname__ if isinstance(optimizer, FlatOptimizer) else ""
    said = exchange.compare(bytes([shares, cut]) + hashlib.sha256(kind.encode()).digest()[:30])
    if not all(word[0] for word in said):
        return None
    cut = Cut(min(word[1] for word in said)) if len({word[2:] for word in said}) == 1 else Cut.NOWHERE
    settings = len(Pieces.settings_of(optimizer.torch)) if cut and isinstance(optimizer, FlatOptimizer) else 0
    push, pull = replica.push.message, replica.pull.message
    room = exchange.room(push.numel(), push.dtype, pull.numel(), lines(replica, exchange.size), SETTINGS + settings)
    if room is None:
        return None
    large = replica.flat.numel * replica.flat.weights.element_size() > SMALL
    room.together = cut > Cut.NOWHERE and (config.plan == "sharded" or (config.plan == "auto" and large))
    replica.move(room.rows[exchange.rank], room.pull, fill=room.leads)
    if isinstance(optimizer, FlatOptimizer):
        optimizer.rebind()  # nothing is to hold the messages' former memory
    room.publish(lambda: None)
    if room.together:
        assert isinstance(optimizer, FlatOptimizer)
        span = divide(replica.flat.slots, replica.flat.numel, exchange.size, cut == Cut.TENSORS)[exchange.rank]
        part = Pieces(optimizer, span, room.combined[: replica.flat.numel])
        part.spread(exchange, room.leads)
        room.spans = pieces(span)
        own: Pieces | FlatOptimizer | Average | None = part
    else:
        room.spans = pieces(slice(0, replica.flat.numel)) if room.leads else []
        own = optimizer if room.leads else None
    if room.leads and replica.flat.numel < replica.push.tail_at:
        room.spans.append(slice(replica.flat.numel, replica.push.tail_at))
    return Slices(room, replica, rule, own, config)


def _shareable(replica: Replica) -> bool:
    """Whether the weights may be shared: nothing but the server's step changes them, and they are in the host's memory."""
    renormalise = any(getattr(m, "max_norm", None) is not None for m in replica.flat.model.modules() if _embeds(m))
    return replica.flat.weights.device.type == "cpu" and replica.wire_is_grad and not renormalise


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))
