"""What is to be trained where, and what a run would ask of the communicator for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from mpips.comm.node_group import BufferSpec
from mpips.comm.reduce_scatter import length
from mpips.model.flat import ALIGNMENT, Slot, lay_out
from mpips.model.layout import SMALL, buckets
from mpips.model.message.header import COLUMNS, CONTROL_BYTES
from mpips.optim.hyperparameters import LIMBS
from mpips.reduce.shared_memory_transport import SETTINGS

MODEL = torch.float32
How = Literal["one process", "shared memory, root", "shared memory, sharded", "rooms, root", "rooms, sharded"]


@dataclass(frozen=True)
class Machine:
    """Its figures.

    Attributes:
        link: bytes a second of a node's link, each way at once.
        latency: seconds until the first byte of a message arrives.
        message: seconds that a leader takes to begin and to end one send or one receive.
        memory: bytes a second that the ranks of a node together read and write; one rank alone has its part of it.
    """

    link: float = 25e9
    latency: float = 2e-6
    message: float = 5e-7  # measured: 0.05 to 0.4 us to begin or to end one that has been made before
    memory: float = 200e9


@dataclass(frozen=True)
class Job:
    """A model of float32 on so many ranks, each node with as many as the others; the optimizer works element by element.

    Attributes:
        nodes, ranks: the nodes, and the ranks of each.
        numel: elements of the flat buffer.
        slots: its tensors.
        plan, comm_dtype: as in the configuration.
        bucket: bytes that a node sends at a time.
        state: floats that the optimizer keeps of each parameter.
        numbers: its hyperparameters, of all groups together; Adam has 11 in one.
    """

    nodes: int
    ranks: int
    numel: int
    slots: Sequence[Slot] = field(repr=False)
    plan: Literal["auto", "root", "sharded"] = "auto"
    comm_dtype: Literal["full", "bfloat16"] = "full"
    bucket: int = 16_000_000
    state: float = 2
    numbers: int = 11

    @classmethod
    def of(cls, nodes: int, ranks: int, size: float, **others: object) -> Job:
        """One with a model of `size` bytes in a single tensor."""
        tensor = torch.empty(max(1, round(size / MODEL.itemsize)), dtype=MODEL, device="meta")
        slots, numel = lay_out([("model", tensor)])
        return cls(nodes, ranks, numel, slots, **others)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks

    @property
    def model(self) -> int:
        """The model's bytes."""
        return self.numel * MODEL.itemsize

    @property
    def sharded(self) -> bool:
        """Whether every rank serves a slice: as `mpips.reduce.choice` decides."""
        return self.size > 1 and (self.plan == "sharded" or (self.plan == "auto" and self.model > SMALL))

    @cached_property
    def buckets(self) -> list[list[slice]]:
        """For each bucket the slice of each rank, node by node: as `mpips.reduce.choice.deal` cuts them."""
        if not self.sharded:
            return [[slice(0, self.numel)] + [slice(self.numel, self.numel)] * (self.size - 1)]
        each = length(self.bucket, self.contents, self.nodes) if self.nodes > 1 else self.numel
        return buckets(self.slots, self.numel, [self.ranks] * self.nodes, each)

    @cached_property
    def served(self) -> list[int]:
        """How many elements each rank serves, node by node."""
        return [sum(span.stop - span.start for span in own) for own in zip(*self.buckets, strict=True)]

    @property
    def how(self) -> How:
        """The way of a round."""
        if self.size == 1:
            return "one process"
        if self.nodes == 1:
            return "shared memory, sharded" if self.sharded else "shared memory, root"
        return "rooms, sharded" if self.sharded else "rooms, root"

    @property
    def travels(self) -> torch.dtype:
        """What weights and gradients are between nodes."""
        return torch.bfloat16 if self.comm_dtype == "bfloat16" and self.how == "rooms, sharded" else MODEL

    @property
    def contents(self) -> BufferSpec:
        """What `mpips.reduce.choice` asks of a room, for a model without buffers and a run without further metrics."""
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
            together=self.sharded,
            between=True,
            wire=self.travels,
        )

    @property
    def hands(self) -> int:
        """The ranks of a node that add up and join, as `MultiNodeGroup._by_hand` has it: all but a leader that is not alone."""
        return max(1, self.ranks - 1)

    @property
    def tail(self) -> int:
        """The bytes of a push message's tail: a row for each rank, and what its optimizer's numbers are."""
        contents = self.contents
        return (contents.numel - contents.tail) * MODEL.itemsize
