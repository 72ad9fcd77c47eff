"""Whether the workers make the same calls and loops, and draw the same data; what is wrong, in a line that names them.

A fault ends the run on all ranks. What may be right, as workers may take different numbers of steps, is a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mpips.model.message import BEGUN, DIGEST, DRAWN, WEIGHT, Call

WAITING = 3.0  # seconds until a warning names the workers that wait for others
FREE = (Call.NONE, Call.LOOP, Call.LEAVE, Call.STATE)  # which a worker may be in while others take any number of steps

Rows = Mapping[int, Mapping[str, float]]  # rank -> its row of the tail, by column


class Agreement:
    """What the workers' rows say of their calls, over the rounds of a run.

    Args:
        first: the rank of the first worker.
        clock: returns the time in seconds.
        warn: reports a warning.
    """

    def __init__(self, first: int, clock: Callable[[], float], warn: Callable[[str], object]) -> None:
        self._first, self._clock, self._warn = first, clock, warn
        self._apart = False  # whether a worker has looped over its shard without a step where others have taken steps
        self._alone = self._told_alone = False  # whether workers loop over their shards where others have ended
        self._waiting: tuple[dict[int, Call], float] = {}, 0.0  # rank -> the call that it waits in, and since when

    def look(self, rows: Rows, active: float, measurer: int | None) -> tuple[Call, str]:
        """Return the call that the workers wait in and that is answered now, or NONE; and a fault, or "".

        Args:
            rows: the rows of a round.
            active: the number of workers that have batches.
            measurer: the rank that measures in `ps.validate`, unless the server does.
        """
        calls = _calls(rows)
        if Call.STATE in calls.values():
            going = [call for rank, call in calls.items() if call or not rows[rank]["done"]]
            return Call.STATE, self._differ(calls) if Call.NONE in going else ""  # a step without the contribution of who waits
        if not active:
            return self.meet(rows, measurer)
        if not (fault := self._separated(rows, calls)):
            self._name_waiting(calls)
            self._name_apart(rows)
        return Call.NONE, fault

    def meet(self, rows: Rows, measurer: int | None) -> tuple[Call, str]:
        """Return the call that all workers wait in, apart from workers at the end of their script; else NONE, and a fault.

        Args:
            rows: the rows of a round.
            measurer: the rank that measures in `ps.validate`, unless the server does.
        """
        calls = _calls(rows)
        present = {call for call in calls.values() if call != Call.LEAVE}
        if present == {Call.AVERAGE, Call.LOOP}:  # a worker without batches has no part in the average
            return Call.AVERAGE, ""
        measured = measurer is None or calls.get(measurer) != Call.LEAVE
        self._alone |= Call.BEGIN in present and Call.LEAVE in calls.values()  # nobody takes the part of who has left
        if len(present) > 1 or (self._alone and self._apart) or (Call.VALIDATE in present and not measured):
            return Call.NONE, self._differ(calls)
        return present.pop() if present else Call.LEAVE, ""

    def _separated(self, rows: Rows, calls: Mapping[int, Call]) -> str:
        """Return a fault if a worker waits in a call that another worker can no longer make."""
        for rank, call in calls.items():
            if call in FREE:
                continue
            if any(_has_passed(call, rows[rank], other) for other in rows.values() if not other["call"]):
                return self._differ(calls)
        return ""

    def _name_waiting(self, calls: Mapping[int, Call]) -> None:
        """Warn once, after WAITING seconds, which workers wait for which."""
        waiting, now = {rank: call for rank, call in calls.items() if call not in FREE}, self._clock()
        if waiting != self._waiting[0]:
            self._waiting = waiting, now
        elif waiting and now - self._waiting[1] > WAITING:
            self._waiting = waiting, math.inf
            self._warn(f"{self._where(calls)}; who waits goes on when all workers make that call")

    def _name_apart(self, rows: Rows) -> None:
        """Warn of workers whose loops over their shards are not those of the others, once of each kind.

        Either they take no step in a loop in which others do, or they step in one that others, who have ended, do not make.
        """
        if not any(row["stepped"] and not row["call"] for row in rows.values()):
            return
        without = [rank for rank, row in rows.items() if row["call"] == Call.LOOP and row["drawn"] and not row["stepped"]]
        if without and not self._apart:
            self._apart = True
            self._warn_of(
                without,
                "looped over its shard without a step, and others take steps in that loop; all workers make the same loops "
                "over a shard: evaluate in ps.validate(), or over data that are not given to ps.shard()",
            )
        if self._alone and not self._told_alone:
            self._told_alone = True
            left = [rank for rank, row in rows.items() if row["call"] == Call.LEAVE]
            self._warn_of(left, "come to the end of its script, and the others go on without its part of the data")

    def _warn_of(self, ranks: Sequence[int], what: str) -> None:
        self._warn(f"worker {', '.join(map(self._worker, ranks))} has {what}")

    def _worker(self, rank: int) -> str:
        return f"{rank - self._first} (rank {rank})"

    def _where(self, calls: Mapping[int, Call]) -> str:
        where: dict[Call, list[str]] = {}
        for rank, call in calls.items():
            where.setdefault(call, []).append(self._worker(rank))
        return "; ".join(f"worker{'s' * (len(who) > 1)} {', '.join(who)} at {call.text}" for call, who in where.items())

    def _differ(self, calls: Mapping[int, Call]) -> str:
        """Return the fault of workers that are in these calls, by rank, and cannot meet."""
        what = "each of these calls, in the same order"
        if Call.STATE in calls.values():
            what = "the call of state_dict() at the same place, and worker 0 alone may save what it returns"
        return f"the workers do not make the same calls: {self._where(calls)}. Every worker must make {what}"

    def compare_data(self, rows: Sequence[Sequence[float]]) -> str:
        """Return a fault if workers that contribute, at the same batch of the same loop, have different digests of their data.

        Args:
            rows: the workers' rows of the tail.
        """
        seen: dict[tuple[float, float], dict[int, float]] = {}
        for number, row in enumerate(rows, self._first):
            if row[WEIGHT] and row[DIGEST]:
                seen.setdefault((row[BEGUN], row[DRAWN]), {})[number] = row[DIGEST]
        for digests in seen.values():
            (one, digest), *others = digests.items()
            if other := next((rank for rank, theirs in others if theirs != digest), None):
                return (
                    f"the workers do not have the same data: worker {self._worker(one)} and worker {self._worker(other)} have "
                    f"drawn other items, or from other data. Seed what makes the data and their order alike on all workers "
                    f"before connect (torch.manual_seed, random_split(..., generator=...)); or, for data that are each "
                    f"worker's own, say shard=False"
                )
        return ""


def _calls(rows: Rows) -> dict[int, Call]:
    return {rank: Call(int(row["call"])) for rank, row in rows.items()}


def _has_passed(call: Call, row: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Return whether a worker that steps, with the row `other`, can no longer make the call that another waits in."""
    return other["begun"] > row["begun"] or (call == Call.AVERAGE and other["weight"] > 0)
