"""Aggregation with clients as the rule's rows: a worker hosts several clients, and a rule other than the mean judges each.

    table  gather_bytes, broadcast_bytes         each client's rank, samples and weight, on every rank, in the order of the
    clients tail   reduce (Reduce)                       one row for each rank, as in any round
    body   `reduce/aggregate.py` on `ClientRows` a communicator whose rows are the clients

A rank keeps the contributions of its clients separate. A message holds a slice of each of them, padded with zeros to the
largest number of clients on any rank. The slices are shorter by that factor, so the server receives no more than a bucket of
each rank. If no rank hosts two clients, and the clients are in rank order, each rank contributes its client's body as its own.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor

from mpips.comm import Apply, Communicator, broadcast_bytes, pieces
from mpips.model.message import BAD, SAMPLES, WEIGHT, Contribution, Push
from mpips.reduce.aggregate import AggregationResult, Collectives, bring_together
from mpips.rules import Needs, Rule


def aggregate_clients(
    communicator: Communicator, push: Push, rule: Rule, last: Needs, first: int, bucket_cap_mb: float
) -> AggregationResult:
    """Combine the contributions of all clients by the rule; every rank calls this.

    At the server, the combination replaces the body of its push message, and the tail holds the ranks' rows.

    Args:
        communicator: this rank's end.
        push: this rank's row, and its clients' contributions in `push.clients`, which are overwritten and removed.
        rule: the rule, from `mpips.rules.choose`.
        last: what the last collective delivers, from `mpips.rules.choose`.
        first: the rank of the first worker.
        bucket_cap_mb: the largest message, in MB; the same on every rank.

    Returns:
        The result, at the server. `faulty` holds clients' numbers, with those that were reported as not finite.
    """
    table, collectives, view = _begin(communicator, push, rule, bucket_cap_mb)
    found = bring_together(collectives, view, rule, last, first if view is push else 0)
    push.clients.clear()
    reported = (view.rows[:, BAD] > 0).nonzero().flatten().tolist()
    numbers = dict(zip(table.ranks if view is push else range(table.size), table.numbers, strict=True))
    return AggregationResult(sorted(numbers[row] for row in {*found.faulty, *reported} if row in numbers), found.refused)


def _begin(communicator: Communicator, push: Push, rule: Rule, bucket_cap_mb: float) -> tuple[ClientRows, Collectives, Push]:
    """Return the clients' table, and the communicator and the push message with which to aggregate."""
    counts = bool(push.rows[communicator.rank, WEIGHT])  # if not, none of this rank's clients counts
    for client in push.clients:
        if client.weight > 0 and not (counts and rule.prepare(client.body[: push.gradients.numel()], client.weight)):
            client.body.zero_()
            client.weight = 0
    push.rows[communicator.rank, WEIGHT] = sum(client.weight for client in push.clients)
    clients = ClientRows(communicator, push.clients, round(bucket_cap_mb * 1e6))
    if clients.ranks == sorted(set(clients.ranks)):
        clients.add(push.body)
        return clients, communicator, push
    communicator.reduce(push.message[push.tail_at :], 0, "sum", lambda part, rows: None)
    return clients, clients, ClientView(push, clients)


class ClientRows:
    """A communicator whose rows are the clients of a round, with the calls that `reduce/aggregate.py` needs.

    Args:
        communicator: this rank's end of the ranks' communicator.
        own: this rank's contributions.
        bucket: the largest message, in bytes.

    Attributes:
        rank: this rank.
        size: the number of clients that contribute, on all ranks.
        numbers: the clients' numbers in ascending order, which is the order of the rows.
        ranks, positions: for each client, the rank that hosts it, and its position among the clients of that rank.
        status: `(size, 3)` float64, the samples, weight and bad of each client.
        own: the bodies of this rank's clients, by position.
        lost: nobody, as a run whose workers host clients ends if one dies.
    """

    lost: Set[int] = frozenset()

    def __init__(self, communicator: Communicator, own: list[Contribution], bucket: int) -> None:
        self._communicator, self._bucket = communicator, bucket
        self.rank, self.own = communicator.rank, [client.body for client in own]
        mine = [[c.client, communicator.rank, position, c.samples, c.weight, c.bad] for position, c in enumerate(own)]
        blobs = communicator.gather_bytes(np.array(mine, dtype=np.float64).tobytes())
        table = np.frombuffer(broadcast_bytes(communicator, b"".join(blobs))).reshape(-1, 6)
        table = table[table[:, 0].argsort(kind="stable")]
        self.size, self.status = len(table), torch.from_numpy(table[:, 3:].copy())
        self.numbers, self.ranks, self.positions = table[:, :3].astype(int).T.tolist()

    def reduce(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """Reduce the clients' bodies; `message[:tail]` is a buffer for their sum. See `Communicator`."""
        if needs == "sum":
            self.add(message[:tail])
            self._communicator.reduce(message[:tail], tail, "sum", apply)
            return
        width = 1 + max(self.positions)
        for part in pieces(tail, width * message.element_size(), self._bucket):
            mine = message.new_zeros((width, part.stop - part.start))
            for position, body in enumerate(self.own):
                mine[position] = body[part]
            self._communicator.reduce(mine.view(-1), mine.numel(), "rows", _InOrder(self, part, width, apply))

    def broadcast(self, message: Tensor) -> None:
        """See `Communicator`."""
        self._communicator.broadcast(message)

    def add(self, body: Tensor) -> None:
        """Write the sum of this rank's bodies to `body`."""
        if not self.own:
            body.zero_()
            return
        body.copy_(self.own[0])
        for other in self.own[1:]:
            body.add_(other)


class _InOrder:
    """The `apply` of a reduce that collects a slice from all ranks, and passes it on with a row for each client."""

    def __init__(self, clients: ClientRows, part: slice, width: int, apply: Apply) -> None:
        self._clients, self._part, self._width, self._apply = clients, part, width, apply
        self._rows = torch.empty(0)

    def __call__(self, came: slice, rows: Tensor) -> None:
        length = self._part.stop - self._part.start
        if came.start == 0:
            self._rows = rows.new_empty((self._clients.size, length))
        for row, rank, position in zip(self._rows, self._clients.ranks, self._clients.positions, strict=True):
            start, stop = max(came.start, position * length), min(came.stop, (position + 1) * length)
            if start < stop:
                row[start - position * length : stop - position * length] = rows[rank, start - came.start : stop - came.start]
        if came.stop == self._width * length:
            self._apply(self._part, self._rows)


class ClientView(Push):
    """A push message as `reduce/aggregate.py` sees it on `ClientRows`: the same memory, with a row for each client."""

    def __init__(self, push: Push, clients: ClientRows) -> None:
        self.columns, self.span, self.clients, self.ranks = push.columns, push.span, push.clients, push.ranks
        self.blank, self.raw = push.blank, False
        self._lay_out(push.message, push.lengths)
        self.rows = push.message.new_zeros((clients.size, len(push.columns)))
        self.rows[:, [SAMPLES, WEIGHT, BAD]] = clients.status.to(self.rows)
        self._clients = clients

    def own(self, rank: int) -> list[tuple[int, Tensor]]:
        """Return the contributions of this rank's clients; see `Push`."""
        places = zip(self._clients.ranks, self._clients.positions, strict=True)
        return [(row, self._clients.own[position]) for row, (host, position) in enumerate(places) if host == rank]
