"""Node groups of simulated ranks: their barriers, and the transfers between their leaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpips.comm.mailbox import Letter, raw
from mpips.comm.multi_node import Begin, Finish, Sent
from mpips.comm.node_group import Op

if TYPE_CHECKING:
    from mpips.comm.simulated import World


class SimulatedBarrier:
    """The barrier of a node's `ranks`; see `Barrier`."""

    absent: Set[int] = frozenset()

    def __init__(self, world: World, node: int, ranks: Sequence[int], rank: int) -> None:
        self.world, self.node, self.ranks, self.rank = world, node, ranks, rank
        self.leads = rank == ranks[0]

    def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Announce that this rank has arrived; `meanwhile` is not called. See `Barrier`."""
        world, rank = self.world, self.rank
        world.begin(rank, "arrive")
        world.arrived_here[rank] += 1
        if self.leads:
            turn = world.arrived_here[rank]
            world.wait(rank, "arrive", lambda: all(world.arrived_here[one] >= turn for one in self.ranks))

    def release(self) -> None:
        """See `Barrier`."""
        world, rank = self.world, self.rank
        if self.leads:
            world.released[self.node] += 1
            world.together(self.ranks, 0)
        else:
            world.begin(rank, "release")
            turn = world.arrived_here[rank]
            world.wait(rank, "release", lambda: world.released[self.node] >= turn)


class SimulatedLeaderGroup:
    """One leader's end; see `mpips.comm.multi_node.LeaderGroup`.

    A message is read when its transfer is received, the last moment that MPI allows, so a test sees memory that is changed too
    early.

    Args:
        world: the simulated world.
        ranks: the leaders' ranks, node by node.
        node: the index of this leader's node.
    """

    def __init__(self, world: World, ranks: Sequence[int], node: int) -> None:
        self._world, self._ranks, self.node = world, ranks, node

    def allreduce(self, values: Tensor) -> None:
        """See `LeaderGroup`."""
        values.copy_(self._meet("sum", values, lambda given: torch.stack(given).sum(0)))

    def reduce(self, values: Tensor, op: Op) -> None:
        """See `LeaderGroup`."""
        found = self._meet(op, values, lambda given: torch.stack(given).amin(0) if op == "min" else torch.stack(given).sum(0))
        if self.node == 0:
            values.copy_(found)

    def broadcast(self, message: Tensor) -> None:
        """See `LeaderGroup`."""
        message.copy_(self._meet("tell", message, lambda given: given[0]))

    def _meet(self, call: str, values: Tensor, finish: Callable[[list[Tensor]], Tensor]) -> Tensor:
        def ready(given: dict[int, object]) -> Tensor:
            return finish([value.clone() for value in given.values() if isinstance(value, Tensor)])

        call = f"leaders' {call}({values.numel()} x {values.dtype})"
        found = self._world.meet(self._ranks[self.node], call, values, ready, values.nbytes, len(self._ranks))
        assert isinstance(found, Tensor)
        return found

    def progress(self) -> None:
        """Do nothing: simulated messages arrive by themselves. See `LeaderGroup`."""

    def persistent_sendrecv(self, sent: Sent, taken: Sent) -> Begin:
        """See `LeaderGroup`."""
        return lambda: self.sendrecv(sent, taken)

    def sendrecv(self, sent: Sent, taken: Sent) -> Finish:
        """Start a transfer; return a function that waits for its end. Arguments as in `persistent_sendrecv`."""
        world, rank = self._world, self._ranks[self.node]
        world.begin(rank, "swap")
        letters = []
        for node, part in sent:
            letters.append(
                (Letter(raw(part), world.time[rank] + part.nbytes / world.bandwidth), self._box(rank, self._ranks[node]))
            )
            letters[-1][1].append(letters[-1][0])

        def finish() -> None:
            for node, room in taken:
                box = self._box(self._ranks[node], rank)
                world.begin(rank, "take")
                world.wait(rank, "take", lambda box=box: bool(box))  # type: ignore[misc]
                raw(room).copy_(world.arrived(rank, box.pop(0)))
            for letter, box in letters:  # until it is received, its memory must not be changed
                world.wait(rank, "send", lambda one=letter, box=box: not any(one is other for other in box))  # type: ignore[misc]

        return finish

    def _box(self, sender: int, receiver: int) -> list[Letter]:
        return self._world.mail.between.setdefault((sender, receiver), [])
