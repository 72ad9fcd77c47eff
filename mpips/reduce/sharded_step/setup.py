"""How ranks come to serve slices: they agree, move their messages into a room, and deal them out."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from mpips.algorithms.update import Gradient
from mpips.comm import Exchange
from mpips.comm.node_group import Contents, Room
from mpips.config import Config
from mpips.model.layout import SMALL, buckets
from mpips.model.message import Replica
from mpips.optim import hyperparameters as hyper
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.reduce.sharded_optimizer import Cut, Pieces, where
from mpips.reduce.sharded_step.step import SETTINGS, Slices
from mpips.rules import Mean, Rule
from mpips.rules.mean import NormClip

KINDS = ["", "cpu", "cuda"]  # of memory that ranks can share


def settle(
    exchange: Exchange,
    replica: Replica,
    config: Config,
    rule: Rule,
    optimizer: FlatOptimizer | None,
    update: type[Gradient] | None,
    trains: bool,
) -> Slices | None:
    """Move the messages into memory that the ranks share, if they do, and deal out the slices; all ranks call this.

    Args:
        exchange: this rank's end.
        replica: has the server's weights on every rank.
        config: the settings.
        rule: combines.
        optimizer: what the server steps with, on this rank; None if it was given none.
        update: what workers push; None where that is not for slices of one sum.
        trains: whether there is a worker on this rank.

    Returns:
        None where MPI is to carry the messages.
    """
    if exchange.size == 1 or update is None or not config.shared_memory:
        return None
    apart, clip = update.apart and trains, None if update.apart else config.clip  # there each worker clips its own steps
    cut = _agreed(exchange, replica, type(rule) in (Mean, NormClip) and _shareable(replica, apart), optimizer)
    if cut is None:
        return None
    settings = len(hyper.read(optimizer.torch)) if cut and optimizer else 0
    contents = _contents(exchange.size, replica, config, cut, SETTINGS + settings)
    room = exchange.room(contents)
    if room is None:
        return None
    raw = update.raw and not config.deterministic  # a rank's own product is rounded before it is added
    replica.move(room.board.row, room.board.pull, fill=room.board.fills, apart=apart, raw=raw)
    if optimizer:
        optimizer.rebind()  # nothing is to hold the messages' former memory
    room.meet()
    deal(room, replica, cut)
    if not room.together and not (update.apart and replica.wire_is_grad):
        return Slices(room, replica, rule, optimizer if room.leads else None, config, exchange, clip)
    assert optimizer
    part = Pieces(optimizer, room.slices, room.combined[: replica.flat.numel], room.stepped, room.rounded)
    part.spread(exchange, room.leads)
    return Slices(room, replica, rule, part if room.together or room.leads else None, config, exchange, clip)


def _agreed(exchange: Exchange, replica: Replica, shares: bool, optimizer: FlatOptimizer | None) -> Cut | None:
    """Where all ranks may cut the optimizer's parameters; None if some rank does not share memory, or not of that kind."""
    cut = where(optimizer.torch) if optimizer else Cut.NOWHERE
    kind = type(optimizer.torch).__qualname__ if optimizer else ""
    memory = KINDS.index(replica.flat.device.type) if shares else 0
    said = exchange.compare(bytes([memory, cut]) + hashlib.sha256(kind.encode()).digest()[:30])
    if not memory or any(word[0] != memory for word in said):
        return None
    return Cut(min(word[1] for word in said)) if len({word[2:] for word in said}) == 1 else Cut.NOWHERE


def _contents(ranks: int, replica: Replica, config: Config, cut: Cut, answer: int) -> Contents:
    """What the ranks' rooms are to hold."""
    push, flat = replica.push.message, replica.flat
    large = flat.numel * flat.weights.element_size() > SMALL
    sharded = cut > Cut.NOWHERE and (config.plan == "sharded" or (config.plan == "auto" and large))
    encoded = sharded and config.wire == "bfloat16" and push.dtype == torch.float32
    return Contents(
        numel=push.numel(),
        dtype=push.dtype,
        tail=replica.push.tail_at,
        pull=replica.pull.message.numel(),
        weights=replica.pull.place,
        model=flat.dtype,
        lines=max(ranks, len(flat.slots)),  # a number for each rank, or for each tensor
        answer=answer,
        together=sharded,
        between=not config.deterministic and len(replica.fragments) == 1,  # a fragment alone is to travel
        wire=torch.bfloat16 if encoded else push.dtype,
        overlap=config.overlap,
        device=flat.device,
    )


def deal(room: Room, replica: Replica, cut: Cut) -> None:
    """Deal out the slices of the body."""
    numel, counts = replica.flat.numel, [len(node) for node in room.nodes]
    dealt = [[slice(0, numel)] + [slice(numel, numel)] * (sum(counts) - 1)]
    if room.together:
        dealt = buckets(replica.flat.slots, numel, counts, room.each, cut == Cut.TENSORS)
    room.serve(dealt, slice(numel, replica.push.tail_at))


def _shareable(replica: Replica, apart: bool) -> bool:
    """Whether the weights may be shared: nothing but the server's step changes them, and memory like theirs can be."""
    renormalises = any(getattr(m, "max_norm", None) is not None for m in replica.flat.model.modules() if _embeds(m))
    return replica.flat.device.type in KINDS and (apart or not renormalises)


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))
