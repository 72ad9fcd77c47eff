"""Which clients train in a round, and on which worker."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from mpips.data.clients.draw import counted, permutation


def chosen(seed: int, round: int, count: int, fraction: float) -> list[int]:
    """Return the clients of a round in ascending order: max(1, round(fraction * count)) of them, uniform without replacement.

    Args:
        seed: with `round`, decides the choice, which is the same on all ranks.
        round: the round.
        count: the number of clients.
        fraction: the fraction of them, from 0 (one client) to 1 (all); C of FedAvg (McMahan et al. 2017, algorithm 1).

    Raises:
        ValueError: `count` is below 1, or `fraction` is not from 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction!r} given; expected a number from 0 to 1")
    drawn = permutation(counted("count", count), "chosen", seed, round)
    return sorted(drawn[: _part(fraction, count)].tolist())


def _part(fraction: float, count: int) -> int:
    """Return the number of clients in a round."""
    return max(1, round(fraction * count))


def hosts(chosen: Sequence[int], workers: int, pinned: bool, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """Return for each worker the clients that it hosts, in the order of `chosen`.

    Args:
        chosen: the clients of the round.
        workers: the number of workers.
        pinned: whether client k always stays on worker k % workers, because it has state of its own. If not, the largest client
            goes first, each to the worker with the least work (Graham 1969: at most 4/3 of the optimum).
        sizes: the work of each client, chosen or not, as in `Clients.sizes`; None if all are equal.

    Raises:
        ValueError: `workers` is below 1.
    """
    counted("workers", workers)
    worker_of = {k: k % workers for k in chosen} if pinned else _balanced(chosen, workers, sizes)
    hosted: list[list[int]] = [[] for _ in range(workers)]
    for k in chosen:
        hosted[worker_of[k]].append(k)
    return hosted


def _balanced(chosen: Sequence[int], workers: int, sizes: Sequence[int] | None) -> dict[int, int]:
    """Return client -> worker: largest clients first, each to the worker with the least work."""
    work = {k: 1 if sizes is None else sizes[k] for k in chosen}
    free = [(0, 0, worker) for worker in range(workers)]  # its work, its clients, its number
    worker_of = {}
    for k in sorted(chosen, key=lambda k: (-work[k], k)):
        load, clients, worker = free[0]
        worker_of[k] = worker
        heapq.heapreplace(free, (load + work[k], clients + 1, worker))
    return worker_of
