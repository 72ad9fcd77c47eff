"""The job: what is trained on which nodes, and the buffers that a run would allocate for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from mpips.comm.codecs import Codec, codec_of
from mpips.comm.node_group import BufferSpec
from mpips.comm.reduce_scatter import bucket_length
from mpips.model.flat import ALIGNMENT, Slot, lay_out
from mpips.model.layout import SMALL, buckets
from mpips.model.message.header import COLUMNS, CONTROL_BYTES
from mpips.optim.hyperparameters import LIMBS
from mpips.reduce.shared_memory_transport import SETTINGS

MODEL = torch.float32
How = Literal["one process", "shared memory, root", "shared memory, sharded", "between nodes, root", "between nodes, sharded"]


@dataclass(frozen=True)
class Machine:
    """The machine's figures.

    Attributes:
        link: bytes per second of a node's link, in each direction at the same time.
        latency: seconds until the first byte of a message arrives.
        message: seconds for a leader to start and complete one send or receive.
        memory: bytes per second that the ranks of a node read and write together; a single rank gets its share.
    """

    link: float = 25e9
    latency: float = 2e-6
    message: float = 5e-7  # measured: 0.05 to 0.4 us to start or complete a persistent request
    memory: float = 200e9


@dataclass(frozen=True)
class Job:
    """A float32 model on nodes with equal numbers of ranks; the optimizer works element by element.

    Attributes:
        nodes, ranks: the number of nodes, and of ranks on each node.
        numel: the elements of the flat buffer.
        slots: the tensors in the flat buffer.
        plan, comm_dtype: as in the configuration.
        bucket: the bytes that a node sends at a time.
        state: the floats that the optimizer keeps for each parameter.
        numbers: the number of hyperparameters, in all groups together; Adam has 11 in a group.
    """

    nodes: int
    ranks: int
    numel: int
    slots: Sequence[Slot] = field(repr=False)
    plan: Literal["auto", "root", "sharded"] = "auto"
    comm_dtype: str = "full"
    bucket: int = 16_000_000
    state: float = 2
    numbers: int = 11

    @classmethod
    def of(cls, nodes: int, ranks: int, size: float, **others: object) -> Job:
        """Return a job with a model of `size` bytes in a single tensor."""
        tensor = torch.empty(max(1, round(size / MODEL.itemsize)), dtype=MODEL, device="meta")
        slots, numel = lay_out([("model", tensor)])
        return cls(nodes, ranks, numel, slots, **others)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """The number of ranks of all nodes."""
        return self.nodes * self.ranks

    @property
    def model(self) -> int:
        """The bytes of the model."""
        return self.numel * MODEL.itemsize

    @property
    def sharded(self) -> bool:
        """Whether every rank serves a slice, as decided by `mpips.reduce.choice`."""
        return self.size > 1 and (self.plan == "sharded" or (self.plan == "auto" and self.model > SMALL))

    @cached_property
    def buckets(self) -> list[list[slice]]:
        """For each bucket the slice of each rank, node by node, as cut by `mpips.reduce.choice.deal`."""
        if not self.sharded:
            return [[slice(0, self.numel)] + [slice(self.numel, self.numel)] * (self.size - 1)]
        each = bucket_length(self.bucket, self.spec, self.nodes) if self.nodes > 1 else self.numel
        return buckets(self.slots, self.numel, [self.ranks] * self.nodes, each)

    @cached_property
    def served(self) -> list[int]:
        """The number of elements that each rank serves, node by node."""
        return [sum(span.stop - span.start for span in own) for own in zip(*self.buckets, strict=True)]

    @property
    def how(self) -> How:
        """The kind of transport that a round uses."""
        if self.size == 1:
            return "one process"
        if self.nodes == 1:
            return "shared memory, sharded" if self.sharded else "shared memory, root"
        return "between nodes, sharded" if self.sharded else "between nodes, root"

    @property
    def codec(self) -> Codec:
        """How gradients and weights are encoded between nodes."""
        return codec_of(self.comm_dtype if self.how == "between nodes, sharded" else "full", MODEL)

    @property
    def spec(self) -> BufferSpec:
        """The buffers that `mpips.reduce.choice` asks for, for a model without buffers and without extra metrics."""
        weights = self.numel * MODEL.itemsize
        return BufferSpec(
            numel=self.numel + len(self.slots) + self.size * (len(COLUMNS) + LIMBS * self.numbers),
            dtype=MODEL,
            tail=self.numel,
            pull=CONTROL_BYTES + -(-weights // ALIGNMENT) * ALIGNMENT,
            weights=slice(CONTROL_BYTES, CONTROL_BYTES + weights),
            model=MODEL,
            lines=max(self.size, len(self.slots)),
            answer=SETTINGS,
            sharded=self.sharded,
            between=True,
            codec=self.codec,
        )

    @property
    def hands(self) -> int:
        """The ranks of a node that add and join, as in `MultiNodeGroup._own_share`: all but the leader, unless it is alone."""
        return max(1, self.ranks - 1)

    @property
    def tail(self) -> int:
        """The bytes of the push message's tail: a row and the hyperparameters for each rank."""
        spec = self.spec
        return (spec.numel - spec.tail) * MODEL.itemsize
