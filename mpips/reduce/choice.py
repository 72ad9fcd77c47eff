"""The choice of a run's transport: ranks agree on it, move their messages to shared memory, and assign the slices."""

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

KINDS = ["", "cpu", "cuda"]  # the kinds of memory that ranks can share; "" is none


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
        replica: this rank's copy of the model, which has the server's weights.
        config: the settings.
        mode: the row of MODES.
        optimizer: the server's optimizer, on every rank; None if this rank was given none.
        rule: the rule, from `mpips.rules.choose`.
        last: what the last collective delivers, from `mpips.rules.choose`.
        serves: whether the server is on this rank.

    Returns:
        The transport.
    """
    first = int(communicator.size > 1 and not config.server_trains)
    clip = None if mode.local else config.clip  # with local steps each worker clips its own
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
    """Move the messages to memory that the ranks of a node share, and assign the slices.

    Returns:
        The group, and the optimizer of this rank's slices, None if it serves none. None if messages must be sent instead.
    """
    update = summed(mode, config)
    if communicator.size == 1 or update is None or not config.shared_memory:
        return None
    lasts = replica.flat.device.type == "cpu" or not config.min_workers  # with a process its memory on a device goes
    apart = update.apart and trains
    cut = _agreed(communicator, replica, lasts and _takes_slices(rule, config) and _shareable(replica, apart), optimizer)
    if cut is None:
        return None
    settings = len(hyper.read(optimizer.torch)) if cut and optimizer else 0
    spec = _buffer_spec(communicator.size, replica, config, cut, SETTINGS + settings, rule)
    group = communicator.node_group(spec)
    if group is None:
        return None
    raw = update.raw and not (config.deterministic and rule.prepares)  # then the rule prepares what it does by messages
    replica.move(group.buffers.row, group.buffers.pull, fill=group.buffers.fills, apart=apart, raw=raw)
    replica.keeps_push = group.buffers.place > 0 and not rule.prepares
    if optimizer:
        optimizer.rebind()  # releases the messages' former memory
    group.barrier()
    deal(group, replica, cut)
    if not group.sharded and not (update.apart and replica.wire_is_grad):
        return group, optimizer if group.leads else None
    assert optimizer
    shard = ShardedOptimizer(optimizer, group.slices, group.combined[: replica.flat.numel], group.stepped, group.rounded)
    shard.spread(communicator, group.leads)
    return group, shard if group.sharded or group.leads else None


def _agreed(communicator: Communicator, replica: Replica, shares: bool, optimizer: FlatOptimizer | None) -> Granularity | None:
    """Return how finely all ranks may cut the optimizer's parameters; None if they do not all share memory of one kind."""
    cut = where(optimizer.torch) if optimizer else Granularity.NOWHERE
    kind = type(optimizer.torch).__qualname__ if optimizer else ""
    memory = KINDS.index(replica.flat.device.type) if shares else 0
    answers = communicator.allgather_digests(bytes([memory, cut]) + hashlib.sha256(kind.encode()).digest()[:30])
    if not memory or any(word[0] != memory for word in answers):
        return None
    return Granularity(min(word[1] for word in answers)) if len({word[2:] for word in answers}) == 1 else Granularity.NOWHERE


def _buffer_spec(ranks: int, replica: Replica, config: Config, cut: Granularity, answer: int, rule: Rule) -> BufferSpec:
    """Return the size and layout of the node groups' buffers."""
    push, flat = replica.push.message, replica.flat
    large = flat.numel * flat.weights.element_size() > SMALL
    plan = "root" if config.min_workers else config.plan  # a slice's optimizer state would be gone with its rank
    sharded = cut > Granularity.NOWHERE and (plan == "sharded" or (plan == "auto" and large))
    products = ranks * (ranks + 1) if rule.needs == "gram" else 0  # one for each pair of ranks, and a flag for each rank
    return BufferSpec(
        numel=push.numel(),
        dtype=push.dtype,
        tail=replica.push.tail_at,
        pull=replica.pull.message.numel(),
        weights=replica.pull.place,
        model=flat.dtype,
        lines=max(ranks + (rule.needs != "sum"), products, len(flat.slots)),  # values by rank, by pair of ranks, or by tensor
        answer=max(answer, products),
        sharded=sharded,
        between=rule.needs == "sum"
        and not (config.deterministic or config.min_workers)
        and len(replica.fragments) == 1,  # with fragments, only a fragment is to be sent
        codec=codec_of(config.comm_dtype if sharded else "full", push.dtype),
        overlap=config.overlap,
        device=flat.device,
    )


def deal(group: NodeGroup, replica: Replica, cut: Granularity) -> None:
    """Assign the slices of the body to the ranks.

    Args:
        group: this rank's group.
        replica: this rank's copy of the model.
        cut: how finely the optimizer's parameters may be cut.
    """
    numel, counts = replica.flat.numel, [len(node) for node in group.nodes]
    dealt = [[slice(0, numel)] + [slice(numel, numel)] * (sum(counts) - 1)]
    if group.sharded:
        dealt = buckets(replica.flat.slots, numel, counts, group.max_elements, cut == Granularity.TENSORS)
    group.serve(dealt, slice(numel, replica.push.tail_at))


def _takes_slices(rule: Rule, config: Config) -> bool:
    """Return whether each rank may combine its own slices by this rule.

    All rules may, except those that remember something, whose state would be in parts on all ranks; and some that need inner
    products: those that measure from an origin of their own, which has the whole model's length; in deterministic mode, as the
    sum of products would depend on which rank serves which slice; and with fragments, whose ends need not be those of slices.
    """
    if type(rule).state_dict is not Rule.state_dict:
        return False
    if rule.needs != "gram":
        return True
    return type(rule).origin is Rule.origin and not config.deterministic and config.local.fragments == 1


def _shareable(replica: Replica, apart: bool) -> bool:
    """Return whether the ranks may share the weights: such memory exists, and only the server's step changes the weights."""
    renormalises = any(getattr(m, "max_norm", None) is not None for m in replica.flat.model.modules() if _embeds(m))
    return replica.flat.device.type in KINDS and (apart or not renormalises)


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))
