"""One worker's part in a communication round of federated training."""

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
    at_connect: tuple[int, int]
    first: bool
    measuring: bool

    @property
    def pinned(self) -> bool:
        """Whether a client always stays on the same worker."""

    @property
    def measures(self) -> bool:
        """Whether each client's data pass once before training, to measure the loss."""

    def check(self, chosen: int) -> None:
        """Raise ConfigError unless `chosen` clients a round are enough for the rule."""

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """Begin the training of `client`, with `size` items, one of `chosen` clients in this round out of `clients`."""

    def trains(self) -> None:
        """End the measurement of the loss; the client's steps follow."""

    def end(self) -> None:
        """End the client's training."""


class Hosting:
    """One worker's part in a communication round: the batches of its chosen clients, client after client.

    Args:
        update: this worker's update, which is told where each client begins and ends.
        data: the clients. Any other data, a map-style dataset or a tuple of tensors, is partitioned into one client per worker.
        batch_size: the items in a batch; None for all items of a client.
        shuffle, drop_last: as in `Clients.batches`.
        own: whether the data belongs to this worker only; it is then the data of the client with this worker's number.
        seed: with the epoch, decides which clients are chosen, and the order of their items.
        forget: called at the beginning of each client.

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
            self.clients = _alone(data, *update.at_connect)
        else:
            self.clients = data if isinstance(data, Clients) else Clients.split(data, update.at_connect[1], update.config.seed)

    def batches(self, place: Place) -> Iterator[tuple[Any, int, float]]:
        """Yield batches as `Share.batches` does. A place does not advance, as no checkpoint is written within a round.

        Raises:
            ConfigError: there are too few clients for the rule.
        """
        update, sizes, config = self.update, self.clients.sizes, self.update.config.clients
        drawn = chosen(self.seed, place.epoch, len(sizes), config.fraction)
        filled = drawn if self.own else [k for k in drawn if sizes[k]]
        index, workers = update.at_connect if self.own else (update.index, update.workers)
        hosted = hosts(drawn, workers, update.pinned or self.own, sizes)[index]
        update.check(len(drawn))
        update.first = (filled or drawn)[
            0
        ] in hosted  # integer buffers come from the first client, whatever the number of workers
        for k in hosted:
            self._forget()
            update.begin(k, sizes[k], len(filled), len(sizes))
            if update.measures:
                update.measuring = True
                yield from self._pass(k, place.epoch, 1, False, False)
                update.trains()
            yield from self._pass(k, place.epoch, config.epochs, self.shuffle, self.drop_last)
            update.end()

    def _pass(self, k: int, round: int, epochs: int, shuffle: bool, drop_last: bool) -> Iterator[tuple[Any, int, float]]:
        """Yield a client's batches of a number of local epochs."""
        for batch, items, _ in self.clients.batches(k, round, epochs, self.batch_size, self.seed, shuffle, drop_last):
            yield batch, 0, items


def _alone(data: Any, index: int, workers: int) -> Clients:
    """Return clients of which only number `index` has data here."""
    (dataset,) = Clients([data])
    nothing: tuple[int, ...] = ()
    return Clients.by_index(dataset, [range(len(dataset)) if k == index else nothing for k in range(workers)])
