"""Which transport a run has: the ranks agree on it, move their messages into shared memory, and deal out the slices."""

from __future__ import annotations

import hashlib

from torch import nn

from mpips.algorithms.modes import Mode, judges_clients, summed
from mpips.comm import Communicator
from mpips.comm.codecs import codec_of
from mpips.comm.node_group import BufferSpec, NodeGroup
from mpips.config import Config
from mpips.model.layout import SMALL, buckets
from mpips.model.message import Replica
from mpips.optim import hyperparameters as hyper
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.reduce.message_transport import ClientMessageTransport, MessageTransport
from mpips.reduce.sharded_optimizer import Granularity, ShardedOptimizer, where
from mpips.reduce.shared_memory_transport import SETTINGS, SharedMemoryTransport
from mpips.reduce.transport import Transport
from mpips.rules import Needs, Rule

KINDS = ["", "cpu", "cuda"]  # of memory that ranks can share


def choose_transport(
    communicator: Communicator,
    replica: Replica,
    config: Config,
    mode: Mode,
    optimizer: FlatOptimizer | None,
    rule: Rule,
    last: Needs,
    serves: bool,
) -> Transport:
    """Choose the transport of this run's rounds; every rank calls this.

    Args:
        communicator: this rank's end.
        replica: has the server's weights on every rank.
        config: the settings.
        mode: the row of MODES.
        optimizer: what the server steps with, on every rank; None if this rank was given none.
        rule, last: what `mpips.rules.choose` gives.
        serves: whether the server is on this rank.
    """
    first = int(communicator.size > 1 and not config.server_trains)
    clip = None if mode.local else config.clip  # there each worker clips its own steps
    trains = config.server_trains or not serves
    shared = _share_memory(communicator, replica, config, mode, optimizer, rule, trains)
    if shared:
        group, steps = shared
        return SharedMemoryTransport(group, replica, rule, last, first, steps, clip, communicator, config.deterministic)
    replica.push.raw = rule.needs != "sum" and mode.update.raw and not judges_clients(mode, config)
    given = communicator, replica, rule, last, first, optimizer if serves else None, clip
    if judges_clients(mode, config):
        return ClientMessageTransport(config.bucket_cap_mb, *given)
    return MessageTransport(*given)


def _share_memory(
    communicator: Communicator,
    replica: Replica,
    config: Config,
    mode: Mode,
    optimizer: FlatOptimizer | None,
    rule: Rule,
    trains: bool,
) -> tuple[NodeGroup, ShardedOptimizer | FlatOptimizer | None] | None:
    """Move the messages into memory that the ranks of a node share, and deal out the slices.

    Returns:
        The group, and what steps this rank's slices, None where it serves none; or None where messages must be sent.
    """
    update = summed(mode, config)
    if communicator.size == 1 or update is None or not config.shared_memory:
        return None
    apart = update.apart and trains
    cut = _agreed(communicator, replica, _takes_slices(rule, config) and _shareable(replica, apart), optimizer)
    if cut is None:
        return None
    settings = len(hyper.read(optimizer.torch)) if cut and optimizer else 0
    spec = _buffer_spec(communicator.size, replica, config, cut, SETTINGS + settings, rule)
    group = communicator.node_group(spec)
    if group is None:
        return None
    prepares = type(rule).prepare is not Rule.prepare
    raw = update.raw and not (config.deterministic and prepares)  # what the rule prepares is then the same as by messages
    replica.move(group.buffers.row, group.buffers.pull, fill=group.buffers.fills, apart=apart, raw=raw)
    replica.keeps_push = group.buffers.place > 0 and not prepares
    if optimizer:
        optimizer.rebind()  # nothing is to hold the messages' former memory
    group.barrier()
    deal(group, replica, cut)
    if not group.sharded and not (update.apart and replica.wire_is_grad):
        return group, optimizer if group.leads else None
    assert optimizer
    shard = ShardedOptimizer(optimizer, group.slices, group.combined[: replica.flat.numel], group.stepped, group.rounded)
    shard.spread(communicator, group.leads)
    return group, shard if group.sharded or group.leads else None


def _agreed(communicator: Communicator, replica: Replica, shares: bool, optimizer: FlatOptimizer | None) -> Granularity | None:
    """Where all ranks may cut the optimizer's parameters; None if some rank does not share memory, or not of that kind."""
    cut = where(optimizer.torch) if optimizer else Granularity.NOWHERE
    kind = type(optimizer.torch).__qualname__ if optimizer else ""
    memory = KINDS.index(replica.flat.device.type) if shares else 0
    said = communicator.allgather_digests(bytes([memory, cut]) + hashlib.sha256(kind.encode()).digest()[:30])
    if not memory or any(word[0] != memory for word in said):
        return None
    return Granularity(min(word[1] for word in said)) if len({word[2:] for word in said}) == 1 else Granularity.NOWHERE


def _buffer_spec(ranks: int, replica: Replica, config: Config, cut: Granularity, answer: int, rule: Rule) -> BufferSpec:
    """What the ranks' rooms are to hold."""
    push, flat = replica.push.message, replica.flat
    large = flat.numel * flat.weights.element_size() > SMALL
    sharded = cut > Granularity.NOWHERE and (config.plan == "sharded" or (config.plan == "auto" and large))
    products = ranks * (ranks + 1) if rule.needs == "gram" else 0  # of pairs of ranks, and a flag for each
    return BufferSpec(
        numel=push.numel(),
        dtype=push.dtype,
        tail=replica.push.tail_at,
        pull=replica.pull.message.numel(),
        weights=replica.pull.place,
        model=flat.dtype,
        lines=max(ranks + (rule.needs != "sum"), products, len(flat.slots)),  # numbers by rank, by pair of ranks, or by tensor
        answer=max(answer, products),
        sharded=sharded,
        between=rule.needs == "sum"
        and not config.deterministic
        and len(replica.fragments) == 1,  # a fragment alone is to travel
        codec=codec_of(config.comm_dtype if sharded else "full", push.dtype),
        overlap=config.overlap,
        device=flat.device,
    )


def deal(group: NodeGroup, replica: Replica, cut: Granularity) -> None:
    """Deal out the slices of the body."""
    numel, counts = replica.flat.numel, [len(node) for node in group.nodes]
    dealt = [[slice(0, numel)] + [slice(numel, numel)] * (sum(counts) - 1)]
    if group.sharded:
        dealt = buckets(replica.flat.slots, numel, counts, group.max_elements, cut == Granularity.TENSORS)
    group.serve(dealt, slice(numel, replica.push.tail_at))


def _takes_slices(rule: Rule, config: Config) -> bool:
    """Whether ranks may each combine their slices by this rule.

    A rule that needs inner products does not if they are measured from a point of the rule's own, which has the whole model's
    length; in deterministic mode, as the order in which parts of the products are added up would depend on who has computed
    them; and with fragments, which need not end where slices do.
    """
    if rule.needs != "gram":
        return True
    return type(rule).origin is Rule.origin and not config.deterministic and config.local.fragments == 1


def _shareable(replica: Replica, apart: bool) -> bool:
    """Whether the weights may be shared: nothing but the server's step changes them, and memory like theirs can be."""
    renormalises = any(getattr(m, "max_norm", None) is not None for m in replica.flat.model.modules() if _embeds(m))
    return replica.flat.device.type in KINDS and (apart or not renormalises)


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))
