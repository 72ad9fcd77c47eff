"""Ranks that take turns: one thread a rank, of which only one ever runs.

A seeded scheduler chooses who runs next at every call, so one seed is one schedule, repeatable.
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
    """Raised in a rank that the test kills: not an Exception, so that no user code catches it."""


class Schedule(Generic[E]):
    """Who runs, who waits for what, who is gone.

    Args:
        ends: what the program of each rank is given.
        seed: which schedule.

    Attributes:
        choose: the seeded random choice.
        broken: why nobody can go on any more; every call that waits raises it.
    """

    def __init__(self, ends: list[E], seed: int) -> None:
        self.ends = ends
        self.choose = random.Random(seed)
        self.broken: str | None = None
        self._waits: dict[int, tuple[str, Callable[[], bool]]] = {}  # who waits in which call, and when it may go on
        self._alive: set[int] = set()
        self.calls = [0] * len(ends)
        self._kill: dict[int, int] = {}
        self._turn, self._back = [_closed() for _ in ends], _closed()
        self._threaded = False
        self._threads: dict[int, threading.Thread] = {}
        self._leaving: dict[int, list[Callable[[], None]]] = {}  # what ranks do when their program has ended

    def kill(self, rank: int, call: int) -> None:
        """Let `rank` die when it makes its call number `call` (from 0); to take an answer is a call, too."""
        self._kill[rank] = call

    def at_end(self, rank: int, leave: Callable[[], None]) -> None:
        """Call `leave` when the program of `rank` has ended, as `atexit` does."""
        self._leaving.setdefault(rank, []).append(leave)

    def run(self, program: Callable[[E], T]) -> list[T]:
        """Run `program` on every rank and return what each returns, by rank; one that ends by SystemExit(0) returns nothing.

        Raises:
            The first exception that a rank raised; the others are then ended with an CommunicatorError.
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
        """Let one rank after the other run, each until its next call, with its own random streams."""
        state, last = rng.capture(), len(self.ends)
        streams = [state] * (last + 1)
        while self._alive:
            ready = [rank for rank in range(len(self.ends)) if self.can_run(rank)]
            if not ready:
                self.broken = self._standstill()  # which lets everybody run, into an exception
                continue
            rank = self.choose.choice(ready)
            if rank != last:
                streams[last] = rng.capture()  # of nobody, the first time
                rng.restore(streams[rank])
                last = rank
            self._turn[rank].release()
            self._back.acquire()
            if rank not in self._alive:
                self._threads[rank].join()  # what it still holds goes before others run: collecting that may take locks
        rng.restore(state)

    def can_run(self, rank: int) -> bool:
        """Whether this rank neither waits nor has ended."""
        return rank in self._alive and (bool(self.broken) or rank not in self._waits or self._waits[rank][1]())

    def _standstill(self) -> str:
        calls = sorted({call for call, _ in self._waits.values()})
        ranks = {call: sorted(rank for rank, (its, _) in self._waits.items() if its == call) for call in calls}
        waiting = " and ".join(f"ranks {ranks[call]} wait in {call}" for call in calls)
        return f"{waiting}, {sorted(set(range(len(self.ends))) - self._alive)} have ended"

    def pause(self, rank: int) -> None:
        """Let the scheduler choose again before a call."""
        if self._kill.get(rank, -1) == self.calls[rank]:
            raise Killed(f"rank {rank} was killed")
        self.calls[rank] += 1
        if self._threaded:
            self._yield(rank)

    def wait(self, rank: int, call: str, ready: Callable[[], bool]) -> None:
        """Let others run until `ready`; raise CommunicatorError if that can never be."""
        self._waits[rank] = (call, ready)
        self._yield(rank)
        del self._waits[rank]
        self.check()

    def check(self) -> None:
        """Raise CommunicatorError if nobody can go on."""
        if self.broken:
            raise CommunicatorError(self.broken)

    def _yield(self, rank: int) -> None:
        self._back.release()
        self._turn[rank].acquire()


def _closed() -> threading.Lock:
    """A gate that one passes when another has opened it: `acquire` waits for `release`."""
    gate = threading.Lock()
    gate.acquire()
    return gate
