"""The server that answers requests: asynchronous, bounded-staleness and elastic training.

    action_listener    exchange.receive   one request: a pull, or a push that carries the version it was computed from
    update_parameters  clip, any step     the contribution is taken, scaled, compensated, kept for later, or rejected
    get_parameters     exchange.reply     what is new since the worker's version; that is also the push's acknowledgement

One request is dealt with at a time, so no update is lost and no answer is torn. A worker that may not go on yet is simply not
answered. Batches are dealt out: whoever is free takes the next one of the epoch.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor

from mpips.message import ROUNDS, Control, Stop
from mpips.report import rank_states
from mpips.service import Service
from mpips.staleness import POLICIES, compensation

Row = dict[str, float]


class ParameterServer(Service):
    """The asynchronous server; see `Service` for its arguments.

    Attributes:
        staleness: staleness -> contributions taken with it.
        rejected: contributions that were not taken.
        clocks: worker's rank -> pushes answered.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        config, ranks = self.config.staleness, range(self.first, self.first + self.workers)
        self.policy = config.policy or self.mode.policy
        self.compensation = compensation(self.policy, config)
        backup = self.config.backup_workers
        self.needed = self.workers - backup if backup else config.buffer or self.mode.buffer  # contributions of one update
        self.staleness: Counter[int] = Counter()
        self.rejected = 0
        self.clocks = dict.fromkeys(ranks, 0)
        self._rows: dict[int, Row] = {}  # each rank's last
        self._open: set[int] = set()  # ranks that will ask again in this loop
        self._left: set[int] = set()  # ranks whose script has left for good
        self._held: dict[int, bool] = {}  # ranks that wait for an answer: whether with weights
        self._told: set[int] = set()  # ranks that have been told to write a checkpoint
        self._here: Control | None = None  # the answer to a worker on this rank
        self._sum: Tensor | None = None  # contributions kept for the next update
        self._kept, self._share = 0, 0.0  # how many they are, and their weights' sum
        self._dealt: dict[int, deque[int]] = {rank: deque() for rank in ranks}  # batches dealt out and not used up
        self._next, self._returned = 0, deque[int]()  # the next batch of the loop; those that came back

    def start(self) -> None:
        """Agree with the workers and give them the weights; a server that has been stopped starts again."""
        if self._open:
            self.stop()
        self.control.stop, self.stop_asked = Stop.NO, False
        self._left.clear()
        self.broadcast_initial_weights()

    def broadcast_initial_weights(self) -> None:
        """See `Service`."""
        super().broadcast_initial_weights()
        if self.compensation:
            for rank in self.clocks:
                self.compensation.remember(rank, self.replica.pull.weights)

    def run(self) -> None:
        """Serve until every worker has been told that all are done, or that the run is to stop."""
        self._open = set(self.clocks) - self._left
        push = self.replica.push
        while self._open:
            rank, whole = self.exchange.receive(push.message, push.tail_at)
            self.action_listener(rank, whole)
        self._end_loop()

    start_server = run

    def stop(self) -> int:
        """End the run: every worker is told with its next answer, and what it had sent before is taken.

        Returns:
            The version when no worker asks any more.
        """
        self.stop_asked = True
        if not self._open and not self.control.stop:
            self.run()
        return int(self.control.version)

    def stop_server(self) -> None:
        """End the run for all ranks, with the next answer to each."""
        self.stop_asked = True

    def round(self, contributed: bool = True) -> Control:
        """A request of the worker on this rank, in one process: its push message as it stands."""
        self._open = {self.exchange.rank}
        self._here = None
        self.action_listener(self.exchange.rank, contributed)
        assert self._here is not None
        control, self._here = self._here, None
        if control.stop or not control.active:
            self._end_loop()
        self.replica.check_finite(control)
        self.replica.buffers.load(self.replica.pull.buffers)
        return control

    def action_listener(self, rank: int, whole: bool) -> None:
        """Deal with the request that lies in the push message: a push if it is whole, else a pull."""
        row = dict(zip(self._columns, self.replica.push.rows[0].tolist(), strict=True))
        dealt = self._dealt[rank]
        for _ in range(min(int(row["tickets"]), len(dealt))):
            dealt.popleft()
        self._rows[rank] = row
        if whole:
            self.update_parameters(rank, row)
        if row["stop"] == 2:
            self._left.add(rank)
        else:
            self._obey(rank, row)
        self._held[rank] = whole
        self._answer()

    def update_parameters(self, rank: int, row: Row) -> bool:
        """Take a worker's contribution as the mode and the policy will have it.

        Returns:
            Whether it was taken, now or for an update to come.
        """
        push, settings = self.replica.push, self.config.staleness
        late = int(self.control.version - row["round"]) % ROUNDS
        scale = POLICIES[self.policy](late, settings)
        taken = bool(row["weight"]) and scale > 0 and not (self.config.backup_workers and late)
        if row["bad"]:
            self.judge({rank: int(row["bad"]) - 1})
        elif taken:
            self.staleness[late] += 1
            if self.compensation:
                self.compensation.correct(rank, push.gradients, self.replica.pull.weights)
            self._gather(row["samples"] if self.config.backup_workers else scale)
        elif row["weight"]:
            self.rejected += 1
        self.clocks[rank] += 1
        self._note(row)
        return taken and not row["bad"]

    def _gather(self, share: float) -> None:
        """Step with the contribution in the push message, or keep it for an update with several."""
        if self.needed == 1:
            self.step_with(1.0 if self.config.backup_workers else share)
            return
        push = self.replica.push
        if self._sum is None:
            self._sum = torch.zeros_like(push.message)
        elif not self._kept:
            self._sum.zero_()
        self._sum.add_(push.message, alpha=share)
        self._sum[push.tail_at : push.tail_at + len(push.limbs)].copy_(push.limbs)  # integers are not summed
        self._kept, self._share = self._kept + 1, self._share + share

    def _step_if_enough(self) -> None:
        """One update with the mean of what is kept, once it is enough: those that wait for it may be the last ones."""
        push, backup = self.replica.push, self.config.backup_workers
        needed = min(self.needed, max(1, int(self.control.active))) if backup else self.needed
        if self._sum is None or self._kept < needed:
            return
        whole = self._share if backup else self._kept
        push.body.copy_(self._sum[: push.tail_at]).div_(whole)
        behind = push.tail_at + len(push.limbs)
        push.limbs.copy_(self._sum[push.tail_at : behind])
        push.presence.copy_(self._sum[behind : behind + len(push.presence)])
        self._kept, self._share = 0, 0.0
        if self.replica.flat.first_nonfinite(push.gradients) is None:
            self.step_with()

    def _note(self, row: Row) -> None:
        """One push in the report, and whether a checkpoint is due."""
        control, samples = self.control, row["samples"]
        names = ("loss", *self.config.metrics)
        means = [row[name] / samples if samples else math.nan for name in names]
        control.round += 1
        control.loss, control.lr = means[0], self.lr
        every = self.config.checkpoint.every
        if self.folder and every and control.round % every == 0:
            control.checkpoint = 1
        now = self.exchange.clock()
        speed, self._last = samples / max(now - self._last, 1e-9), now
        line = (control.round, self.place.epoch, control.version, samples, means[0], control.lr, *means[1:])
        self.report.round(line, samples_per_s=speed, ranks=rank_states(dict(sorted(self._rows.items())), self.trains))

    def _obey(self, rank: int, row: Row) -> None:
        self.obey_ranks({rank: row | {"stop": min(row["stop"], 1)}})
        if self.control.stop == Stop.PREEMPTED:
            self.control.checkpoint = bool(self.folder)

    def _answer(self) -> None:
        """Answer every rank that waits and may go on; write a checkpoint when all have been told to."""
        answered = True
        self.control.active = sum(rank not in self._left and not row["done"] for rank, row in self._all_rows().items())
        self._step_if_enough()
        while answered:
            going = [rank for rank in sorted(self._held) if self._may_go(rank)]
            for rank in going:
                self.get_parameters(rank, self._held.pop(rank))
            answered = bool(going) and self._saved()

    def _all_rows(self) -> dict[int, Row]:
        return {rank: self._rows.get(rank, {"done": 0.0}) for rank in self.clocks}

    def _may_go(self, rank: int) -> bool:
        if self.control.checkpoint and rank in self._told:
            return False  # it has given its state: nothing more of it until the checkpoint is written
        if rank in self._left or self.control.stop or not self.control.active:
            return True
        row = self._rows[rank]
        if self.control.checkpoint and (self._held[rank] or row["done"]):
            return True
        if row["done"]:
            return False
        if self.config.backup_workers and self._held[rank]:
            return row["round"] != self.control.version % ROUNDS
        return not self.mode.bounded or self.clocks[rank] - self._slowest() <= self.config.staleness.bound

    def _slowest(self) -> int:
        """The least clock of the workers that are not done: one that is never holds the others."""
        return min(self.clocks[rank] for rank, row in self._all_rows().items() if rank not in self._left and not row["done"])

    def get_parameters(self, rank: int, pushed: bool) -> None:
        """Answer a worker: the control, and the weights if they are not those that it has.

        Args:
            rank: the worker's.
            pushed: whether it has pushed, so that this acknowledges it.
        """
        row, control = self._rows[rank], Control(**vars(self.control))
        told = bool(control.checkpoint) and (pushed or bool(row["done"]) or bool(control.stop))
        control.checkpoint, control.ticket = float(told), -1
        if told:
            self._told.add(rank)
        control.again = float(told and not control.stop)
        if control.active and not control.stop and not row["done"] and not (pushed and self._dealt[rank]):
            control.ticket = self._deal(rank)
        if control.stop or not control.active or rank in self._left:
            self._open.discard(rank)
        pull = self.replica.pull
        pull.control = control
        wanted = row["want"] and row["round"] != self.control.version % ROUNDS
        if self.compensation and (wanted or rank == self.exchange.rank):
            self.compensation.remember(rank, self.replica.pull.weights)
        if rank == self.exchange.rank:
            self._here = control
        else:
            self.exchange.reply(rank, pull.message if wanted else pull.control_message)

    def _deal(self, rank: int) -> int:
        ticket = self._returned.popleft() if self._returned else self._next
        self._next = max(self._next, ticket + 1)
        self._dealt[rank].append(ticket)
        return ticket

    def _saved(self) -> bool:
        """Write the checkpoint that is due, if every rank has been told; whether one was written."""
        if not self.control.checkpoint or self._told != set(self.clocks) - self._left:
            return False
        self.save_model()
        self.control.checkpoint = 0
        self._told.clear()
        return True

    def _end_loop(self) -> None:
        if self._left and not self.control.stop:
            self.end(Stop.ENDED if len(self._left) == self.workers else Stop.LEFT, sorted(self._left))
        self._rows.clear()
        self._next = 0
        self._returned.clear()
        for dealt in self._dealt.values():
            dealt.clear()
        self.place.over = not self.control.stop

    def own_tree(self) -> dict[str, Any]:
        """Clocks, staleness so far, what is kept for the next update, what was sent to whom, and the batches not used up."""
        waiting = sorted([*self._returned, *(ticket for dealt in self._dealt.values() for ticket in dealt)])
        tree = super().own_tree() | {
            "clocks": {str(rank): clock for rank, clock in self.clocks.items()},
            "staleness": {str(late): count for late, count in sorted(self.staleness.items())},
            "rejected": self.rejected,
            "next": self._next,
            "waiting": waiting,
            "kept": self._kept,
            "share": self._share,
            "compensation": self.compensation.tree() if self.compensation else {},
        }
        return tree | ({"sum": self._sum[: self.replica.push.tail_at]} if self._sum is not None and self._kept else {})

    def put_own(self, tree: dict[str, Any]) -> None:
        """See `Service`."""
        super().put_own(tree)
        saved = {int(rank): clock for rank, clock in tree["clocks"].items()}
        self.clocks = {rank: saved.get(rank, min(saved.values(), default=0)) for rank in self.clocks}
        self.staleness = Counter({int(late): count for late, count in tree["staleness"].items()})
        self.rejected, self._next, self._returned = tree["rejected"], tree["next"], deque(tree["waiting"])
        if "sum" in tree:
            self._sum = torch.zeros_like(self.replica.push.message)
            self._sum[: len(tree["sum"])].copy_(tree["sum"])
            self._kept, self._share = tree["kept"], tree["share"]
        if self.compensation and tree["compensation"]:
            self.compensation.put(tree["compensation"])
