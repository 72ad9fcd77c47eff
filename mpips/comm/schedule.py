"""Ranks that take turns: each is a thread, and only one runs at a time.

A seeded scheduler chooses at every call which rank runs next, so that a seed gives the same schedule each time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from mpips.comm import CommunicatorError
from mpips.process import rng

E = TypeVar("E")
T = TypeVar("T")


class Killed(BaseException):
    """Raised in a rank that a test kills. It is not an Exception, so no script catches it."""


class Schedule(Generic[E]):
    """The turns of the ranks: which run, which wait and for what, which have ended.

    Args:
        ends: each rank's communicator, by rank.
        seed: the seed of the schedule.

    Attributes:
        choose: the seeded random generator.
        broken: why no rank can continue, raised by every call that waits; None while some can.
    """

    def __init__(self, ends: list[E], seed: int) -> None:
        self.ends = ends
        self.choose = random.Random(seed)
        self.broken: str | None = None
        self._waits: dict[int, tuple[str, Callable[[], bool]]] = {}  # rank -> its call, and whether it may continue
        self._alive: set[int] = set()
        self.calls = [0] * len(ends)
        self._kill: dict[int, int] = {}
        self._turn, self._back = [_closed() for _ in ends], _closed()
        self._threaded = False
        self._threads: dict[int, threading.Thread] = {}
        self._leaving: dict[int, list[Callable[[], None]]] = {}  # rank -> functions to call when its program has ended

    def kill(self, rank: int, call: int) -> None:
        """Let `rank` die at its call number `call`, from 0. Taking an answer counts as a call."""
        self._kill[rank] = call

    def at_end(self, rank: int, leave: Callable[[], None]) -> None:
        """Call `leave` when the program of `rank` has ended, as `atexit` does."""
        self._leaving.setdefault(rank, []).append(leave)

    def run(self, program: Callable[[E], T]) -> list[T]:
        """Run `program` on every rank.

        Returns:
            What each rank's program returns, by rank, without ranks that end by SystemExit(0).

        Raises:
            BaseException: the first exception that a rank raised; the others are then ended with a CommunicatorError.
        """
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            self._turn[rank].acquire()
            torch.get_num_threads()  # a thread has torch.set_num_threads' number only once something has asked for it
            try:
                results[rank] = program(self.ends[rank])
                for leave in self._leaving.pop(rank, []):
                    leave()
            except SystemExit as end:
                if end.code:
                    errors.append(end)
            except BaseException as error:
                errors.append(error)
            self._alive.discard(rank)
            self._back.release()

        self._alive = set(range(len(self.ends)))
        self._threaded = True
        self._threads = {rank: threading.Thread(target=body, args=(rank,), daemon=True) for rank in self._alive}
        for thread in self._threads.values():
            thread.start()
        self._take_turns()
        self._threaded = False
        if errors:
            raise errors[0]
        return [results[rank] for rank in sorted(results)]

    def _take_turns(self) -> None:
        """Let one rank run after the other, each until its next call, with random streams of its own."""
        state, last = rng.swap(), len(self.ends)
        streams = [state] * (last + 1)
        while self._alive:
            ready = [rank for rank in range(len(self.ends)) if self.can_run(rank)]
            if not ready:
                self.broken = self._standstill()  # now every rank can run, and raises an exception
                continue
            rank = self.choose.choice(ready)
            if rank != last:
                streams[last] = rng.swap(streams[rank])  # the first time, no rank's: stored in the extra entry
                last = rank
            self._turn[rank].release()
            self._back.acquire()
            if rank not in self._alive:
                self._threads[rank].join()  # frees its objects before other ranks run, as their finalizers may take locks
        rng.swap(state)

    def can_run(self, rank: int) -> bool:
        """Return whether `rank` has not ended, and does not wait or may stop waiting."""
        return rank in self._alive and (bool(self.broken) or rank not in self._waits or self._waits[rank][1]())

    def _standstill(self) -> str:
        calls = sorted({call for call, _ in self._waits.values()})
        ranks = {call: sorted(rank for rank, (its, _) in self._waits.items() if its == call) for call in calls}
        waiting = " and ".join(f"ranks {ranks[call]} wait in {call}" for call in calls)
        return f"{waiting}, {sorted(set(range(len(self.ends))) - self._alive)} have ended"

    def pause(self, rank: int) -> None:
        """Let the scheduler choose again before a call of `rank`.

        Raises:
            Killed: the rank is to die at this call.
        """
        if self._kill.get(rank, -1) == self.calls[rank]:
            raise Killed(f"rank {rank} was killed")
        self.calls[rank] += 1
        if self._threaded:
            self._yield(rank)

    def wait(self, rank: int, call: str, ready: Callable[[], bool]) -> None:
        """Let other ranks run until `ready()` is true.

        Raises:
            CommunicatorError: it can never be.
        """
        self._waits[rank] = (call, ready)
        self._yield(rank)
        del self._waits[rank]
        self.check()

    def check(self) -> None:
        """Raise CommunicatorError if no rank can continue."""
        if self.broken:
            raise CommunicatorError(self.broken)

    def _yield(self, rank: int) -> None:
        self._back.release()
        self._turn[rank].acquire()


def _closed() -> threading.Lock:
    """Return a lock that is held, so that `acquire` waits until another thread calls `release`."""
    gate = threading.Lock()
    gate.acquire()
    return gate
