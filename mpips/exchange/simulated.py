"""The exchange with all ranks in one process: one thread a rank, of which only one ever runs.

A seeded scheduler chooses who runs next at every call, so one seed is one schedule, repeatable. Time is virtual unless a
real clock is given. A world of one rank needs no thread: that is how a script runs without MPI.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mpips import rng
from mpips.exchange import SERVER, Apply, ExchangeError, pieces
from mpips.rule import Needs

T = TypeVar("T")


class Killed(BaseException):
    """Raised in a rank that the test kills: not an Exception, so that no user code catches it."""


class World:
    """Several ranks in one process.

    Args:
        size: the number of ranks.
        seed: which schedule.
        latency: virtual seconds that each call takes.
        bandwidth: virtual bytes a second.
        clock: a real clock to use in place of virtual time.
        bucket: largest slice, in bytes, that `combine` hands over as rows.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        latency: float = 1e-5,
        bandwidth: float = 1e10,
        clock: Callable[[], float] | None = None,
        bucket: int = 1 << 24,
    ) -> None:
        self.size, self.bucket, self.real_clock = size, bucket, clock
        self.latency, self.bandwidth = latency, bandwidth
        self.ends = [SimulatedExchange(self, rank) for rank in range(size)]
        self.time = [0.0] * size
        self._choose = random.Random(seed)
        self._here: dict[int, tuple[str, object]] = {}  # who has arrived at the call in progress, with what
        self._result: object = None
        self._broken: str | None = None
        self._kill: dict[int, int] = {}
        self._turn = [threading.Semaphore(0) for _ in range(size)]
        self._back = threading.Semaphore(0)
        self._threaded = False

    def kill(self, rank: int, call: int) -> None:
        """Let `rank` die when it makes its call number `call` (from 0)."""
        self._kill[rank] = call

    def sleep(self, rank: int, seconds: float) -> None:
        """Let virtual time pass for `rank` alone."""
        self.time[rank] += seconds

    def run(self, program: Callable[[SimulatedExchange], T]) -> list[T]:
        """Run `program` on every rank and return what each returns, by rank.

        Raises:
            The first exception that a rank raised; the others are then ended with an ExchangeError.
        """
        results: dict[int, T] = {}
        errors: list[BaseException] = []
        state = rng.capture()
        streams = [state] * self.size
        alive = set(range(self.size))

        def body(rank: int) -> None:
            self._turn[rank].acquire()
            try:
                results[rank] = program(self.ends[rank])
            except BaseException as error:
                errors.append(error)
            alive.discard(rank)
            self._back.release()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.size)]
        self._threaded = True
        for thread in threads:
            thread.start()
        while alive:
            ready = sorted(alive - self._here.keys())
            if not ready:  # everyone left waits for somebody who has ended
                gone = sorted(set(range(self.size)) - alive)
                self._broken = self._broken or f"ranks {sorted(self._here)} wait in {self._names()}, {gone} have ended"
                ready = sorted(alive)
                self._here.clear()
            rank = self._choose.choice(ready)
            rng.restore(streams[rank])
            self._turn[rank].release()
            self._back.acquire()
            streams[rank] = rng.capture()
        self._threaded = False
        rng.restore(state)
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(self.size)]

    def meet(self, rank: int, call: str, given: object, finish: Callable[[dict[int, object]], object], cost: int) -> object:
        """Wait until every rank has made this call; the last to come computes the common result with `finish`."""
        self._pause(rank)
        others = {name for name, _ in self._here.values()}
        if others - {call}:
            self._broken = f"rank {rank} is at {call}, ranks {sorted(self._here)} at {self._names()}"
        if self._broken:
            raise ExchangeError(self._broken)
        self._here[rank] = (call, given)
        if len(self._here) == self.size:
            self._result = finish({r: value for r, (_, value) in sorted(self._here.items())})
            self.time = [max(self.time) + self.latency + cost / self.bandwidth] * self.size
            self._here.clear()
        else:
            self._yield(rank)
        if self._broken:
            raise ExchangeError(self._broken)
        return self._result

    def _pause(self, rank: int) -> None:
        """Let the scheduler choose again before a call, so that ranks arrive in every order."""
        if self._kill.get(rank, -1) == self.ends[rank].calls:
            raise Killed(f"rank {rank} was killed")
        self.ends[rank].calls += 1
        if self._threaded:
            self._yield(rank)

    def _yield(self, rank: int) -> None:
        self._back.release()
        self._turn[rank].acquire()

    def _names(self) -> str:
        return " and ".join(sorted({name for name, _ in self._here.values()}))


class SimulatedExchange:
    """One rank's end of a simulated world; see `mpips.exchange.Exchange`."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.name = "no MPI, one process" if world.size == 1 else f"simulated, {world.size} ranks"
        self.traffic: Counter[str] = Counter()
        self.calls = 0

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Exchange`."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def combine(self, message: Tensor, tail: int, needs: Needs, apply: Apply) -> None:
        """See `Exchange`."""

        def finish(given: dict[int, object]) -> object:
            messages = [m for m in given.values() if isinstance(m, Tensor)]
            rows = [m[:tail].clone() for m in messages] if needs == "rows" else []
            for other in messages[1:]:
                messages[SERVER][tail if needs == "rows" else 0 :].add_(other[tail if needs == "rows" else 0 :])
            return rows

        call = f"combine({needs}, {message.numel()} x {message.dtype}, tail at {tail})"
        rows = self._meet("combine", call, message, finish, message.numel() * message.element_size())
        if self.rank != SERVER:
            return
        if needs == "sum":
            apply(slice(0, tail), message[:tail].unsqueeze(0))
            return
        assert isinstance(rows, list)
        for part in pieces(tail, message.element_size(), self.world.bucket):
            apply(part, torch.stack([row[part] for row in rows]))

    def publish(self, message: Tensor) -> None:
        """See `Exchange`."""

        def finish(given: dict[int, object]) -> None:
            messages = [m for m in given.values() if isinstance(m, Tensor)]
            for other in messages[1:]:
                other.copy_(messages[SERVER])

        cost = message.numel() * message.element_size()
        self._meet("publish", f"publish({message.numel()} x {message.dtype})", message, finish, cost)

    def collect(self, blob: bytes) -> list[bytes]:
        """See `Exchange`."""
        blobs = self._meet("collect", "collect", blob, lambda given: list(given.values()), len(blob))
        assert isinstance(blobs, list)
        return blobs if self.rank == SERVER else []

    def compare(self, digest: bytes) -> list[bytes]:
        """See `Exchange`."""
        digests = self._meet("compare", "compare", digest, lambda given: list(given.values()), len(digest))
        assert isinstance(digests, list)
        return digests

    def clock(self) -> float:
        """See `Exchange`."""
        return self.world.real_clock() if self.world.real_clock else self.world.time[self.rank]

    def abort(self, status: int) -> None:
        """See `Exchange`."""
        raise SystemExit(status)

    def wait(self, patience: float | None) -> None:
        """See `Exchange`; where nobody runs beside, nobody can be late."""
        self._meet("wait", "wait", None, lambda given: None, 0)

    def _meet(self, kind: str, call: str, given: object, finish: Callable[[dict[int, object]], object], cost: int) -> object:
        if kind in ("combine", "publish"):
            self.traffic[f"{kind} calls"] += 1
            self.traffic[f"{kind} bytes"] += cost
        return self.world.meet(self.rank, call, given, finish, cost)
