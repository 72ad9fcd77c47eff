"""One worker's part in a communication round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mpips.config import Config
from mpips.data import Place
from mpips.data.clients.clients import Clients
from mpips.data.clients.round import chosen, hosts


class Host(Protocol):
    """What trains the clients: a worker's update, in federated modes."""

    config: Config
    index: int
    workers: int
    first: bool
    measuring: bool

    @property
    def pinned(self) -> bool:
        """Whether a client is always on the same worker."""

    @property
    def measures(self) -> bool:
        """Whether a client's data pass once before it trains."""

    def check(self, chosen: int) -> None:
        """So many clients a round are enough for the rule, or ConfigError."""

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """`client`, with `size` items, one of `chosen` in this round out of `clients`, begins."""

    def trains(self) -> None:
        """Its data have passed once."""

    def end(self) -> None:
        """It has trained."""


class Hosting:
    """One worker's part in a communication round: batches of those of its clients that were chosen, client after client.

    Args:
        update: this worker's, which is told where each client begins and ends.
        data: the clients. Any other data, a map-style dataset or a tuple of tensors, is dealt out to one client on each worker.
        batch_size: items in a batch; None for all of a client's.
        shuffle, drop_last: of each client's epochs.
        own: whether the data is this worker's alone, and so that of the client of its number.
        seed: with the epoch, decides which clients are chosen, and their orders.
        forget: called where a client begins.

    Raises:
        ValueError: the data is of another kind.
    """

    def __init__(
        self,
        update: Host,
        data: Any,
        batch_size: int | None,
        shuffle: bool,
        drop_last: bool,
        own: bool,
        seed: int,
        forget: Callable[[], None],
    ) -> None:
        self.update, self.batch_size, self.shuffle, self.drop_last = update, batch_size, shuffle, drop_last
        self.own, self.seed, self._forget = own, seed, forget
        if own and isinstance(data, Clients):
            raise ValueError("shard=False given with Clients, which the workers share; leave it out")
        if own:
            self.clients = _alone(data, update.index, update.workers)
        else:
            self.clients = data if isinstance(data, Clients) else Clients.split(data, update.workers, update.config.seed)

    def batches(self, place: Place) -> Iterator[tuple[Any, int, bool]]:
        """As `Share.batches`; no items are counted, as no checkpoint lies inside a round.

        Raises:
            ConfigError: there are too few clients for the rule.
        """
        update, sizes, config = self.update, self.clients.sizes, self.update.config.clients
        drawn = chosen(self.seed, place.epoch, len(sizes), config.fraction)
        filled = drawn if self.own else [k for k in drawn if sizes[k]]
        mine = hosts(drawn, update.workers, update.pinned or self.own, sizes)[update.index]
        update.check(len(drawn))
        update.first = (filled or drawn)[0] in mine  # whose integer buffers are taken, on whatever number of workers
        for k in mine:
            self._forget()
            update.begin(k, sizes[k], len(filled), len(sizes))
            if update.measures:
                update.measuring = True
                yield from self._pass(k, place.epoch, 1, False, False)
                update.trains()
            yield from self._pass(k, place.epoch, config.epochs, self.shuffle, self.drop_last)
            update.end()

    def _pass(self, k: int, round: int, epochs: int, shuffle: bool, drop_last: bool) -> Iterator[tuple[Any, int, bool]]:
        for batch, _, _ in self.clients.batches(k, round, epochs, self.batch_size, self.seed, shuffle, drop_last):
            yield batch, 0, False


def _alone(data: Any, index: int, workers: int) -> Clients:
    """Clients of whom only the one of this number is known here."""
    (mine,) = Clients([data])
    nothing: tuple[int, ...] = ()
    return Clients.by_index(mine, [range(len(mine)) if k == index else nothing for k in range(workers)])
