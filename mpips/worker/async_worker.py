"""A worker of the server that answers requests: it pulls and pushes whenever it is ready.

    push  update.write, communicator.request    with `overlap`, the next update is computed while the push is under way
    pull  the answer                            the new weights, if there are any; acknowledges the push

Everything else is inherited from `Worker`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor

from mpips.algorithms.easgd import EASGD
from mpips.comm import broadcast_bytes
from mpips.data import Place
from mpips.model.message import CONTROL_BYTES, ROUNDS, SIGNAL, STOP, TICKETS, Call, CallError, Control, Stop, WorkerStatus
from mpips.server.parameter_server.request import BATCH, BUSY, BYE, WEIGHTS
from mpips.server.rank_state import RankState
from mpips.worker.round_worker import Worker


class Client(Worker):
    """One worker of a `ParameterServer`; see `Worker` for its arguments.

    Once the server has told it to stop, the server listens no more: further pushes are dropped, and every call returns at once.

    Attributes:
        version: the version of the weights in the model.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.version = 0
        push, pull = self.replica.push, self.replica.pull
        self._elastic = self.update if isinstance(self.update, EASGD) else None
        self._pull = self._elastic.centre if self._elastic else pull  # receives the answers
        self._request = push.message[push.tail_at :].clone()  # the message of a pull, which leaves the push message alone
        self._outgoing = self._incoming = push.message[:0]
        if self.config.overlap:
            self._outgoing, self._incoming = push.message.clone(), pull.message.clone()
        self._waiting: Callable[[], bool] | None = None
        self._pushed = False  # whether it waits for the answer to a push
        self._overlapping = False  # whether it computes the next update while it waits for that answer
        self._sent = replace(self.place)  # its place at the last push
        self._unsent: Tensor | None = None  # a push message that a checkpoint holds, and that is sent after it
        self._ahead = 0  # in a resumed run, the batches used for the next push
        self._granted: deque[int] = deque()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._granted.clear()
        self._draws = False  # whether it gets its batches from the server
        self.used = self._reported = 0  # batches used since the last push, and how many of them the server knows

    def receive_initial_weights(self) -> None:
        """Receive the initial weights, also when the server starts again; see `Worker`."""
        self.status.done, self.status.stop = False, 0
        super().receive_initial_weights()
        self.version = int(self.control.version)
        if self._elastic:
            self._pull.control = self.control
        if self._unsent is None and not self._ahead:  # else it is the checkpoint's
            self._sent = replace(self.place)
        self._begin_anew()

    def step(self, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> Control:
        """Push and pull after a step of the script; see `Worker`."""
        self.pay()
        if self.control.stop:
            self.replica.flat.clear()
            return self.control
        self._ask_for_centre()
        return super().step(loss, samples, metrics, taken)

    def push(self, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> None:
        """Push a contribution; without `overlap`, `pull` must be called before anything is computed. See `Worker`."""
        self.pay()
        if self.control.stop:
            self.replica.flat.clear()
            return
        self._ask_for_centre()
        super().push(loss, samples, metrics, taken)

    def _ask_for_centre(self) -> None:
        """Pull the centre before an EASGD step that pushes, so that the spring pulls to the newest one."""
        if self._elastic and self._elastic.about_to_push():
            self._before_push(self.ask)

    def _before_push(self, call: Callable[[], object]) -> None:
        """Make a request by `call` that does not report the shard as exhausted, since another push follows."""
        done, self.status.done = self.status.done, False
        call()
        self.status.done = done

    def ask(self, weights: bool = True) -> Control:
        """Pull the newest weights, unless the model has them, or something has been computed that is not pushed yet.

        Args:
            weights: False to pull the control alone.

        Returns:
            The control.
        """
        self.pay()
        asked = bool(self._waiting) and self._receive_answer()  # of the last push
        if (asked and self.status.call) or self.control.stop == Stop.PREEMPTED:  # then the server has ended
            return self.control
        if not self.control.stop or self.status.call:
            self._post_request(weights, busy=not self.status.done)
            self._receive_answer()
        return self.control

    def next_ticket(self) -> int | None:
        """Return the number of this worker's next batch; None if the run is to stop."""
        self.pay()
        self._draws = True
        if self._waiting and not self._granted:
            self._receive_answer()
        while len(self._granted) < 1 + (self.config.overlap and not self._waiting) and not self.control.stop:
            self.ask(weights=not self._elastic)
        return None if self.control.stop else self._granted.popleft()

    def begin(self) -> None:
        """Begin a new loop over the shard; a resumed one with the batches that it has used before. See `Worker`."""
        super().begin()
        self._begin_anew()
        self.used, self._ahead = self._ahead, 0

    def settle(self, pay: bool = True) -> None:
        """Settle, and push what was written and not sent before a checkpoint. See `Worker`."""
        super().settle(pay)
        if self._unsent is not None and not self._checkpoint_due and not self.control.stop:
            message, self._unsent = self._unsent, None
            self._send_message(message)

    def pay(self) -> None:
        """Take part in the checkpoint that was due, then wait until it is written, by another request; see `Worker`."""
        if self._checkpoint_due:
            super().pay()
            self._post_request(not self._elastic, busy=False)
            self._receive_answer()

    def barrier(self, call: Call) -> None:
        """Wait until all workers make this call; see `Worker`."""
        self.pay()
        if self._waiting:
            self._before_push(self._receive_answer)  # a later request reports the end
        if call != Call.LOOP or not self.control.stop:
            super().barrier(call)
        if call == Call.LOOP:
            self._draws = False  # a batch that a step outside loops is dealt would be lost

    def close(self) -> None:
        """Tell the server that this worker sends no more requests; local steps are pushed first."""
        self.pay()
        if self._waiting:
            self._receive_answer()
        if self.control.stop or self.status.stop == BYE:
            return
        self.status.done, self.status.stop = True, BYE
        self.idle()

    def idle(self) -> Control:
        """Push local steps that are not pushed yet; without any, pull. See `Worker`."""
        self.pay()
        if self.update.pending and not self.control.stop:
            self._push()
            return self.pull()
        self._begun = self.communicator.clock()
        self.ask()
        self._left = self.communicator.clock()
        return self.control

    def _row(self, samples: float = 0, loss: float = 0) -> WorkerStatus:
        row = super()._row(samples, loss)
        row.round, row.tickets, row.want = self.version % ROUNDS, self.used, WEIGHTS * self.update.wants_weights
        if self._draws and not self.status.done and len(self._granted) < 1 + self.config.overlap:
            row.want += BATCH
        self._reported, self.used = self._reported + self.used, 0
        return row

    @property
    def _working(self) -> bool:
        """Whether gradients or steps have been computed that are not pushed."""
        return self.update.pending or self.replica.flat.pending or self._unsent is not None

    def _post_request(self, weights: bool, busy: bool) -> None:
        """Send a pull.

        Args:
            weights: whether to ask for weights; not done if new ones would replace those at which something has been computed.
            busy: whether this worker may hold used batches that it has not pushed.
        """
        busy = busy and bool(self.used or self._reported or self._working)
        weights = weights and (bool(self._elastic) or not self._working)
        row = self._row()
        row.want = (int(row.want) & BATCH) + BUSY * busy + WEIGHTS * weights
        values = [*vars(row).values(), *[0.0] * len(self.config.metrics)]
        self._request[len(self._request) - len(values) :].copy_(self._request.new_tensor(values))
        self._waiting = self.communicator.request(self._request, self._landing, CONTROL_BYTES)

    def _push(self) -> None:
        if self._waiting and not self._overlapping:
            self._receive_answer()
        super()._push()

    def _hand_over(self) -> None:
        self._begun = self.communicator.clock()
        if self._waiting:
            self._before_push(partial(self._receive_answer, later=True))
        if self._checkpoint_due:  # taken when the script has finished its step; the message is in it, and is sent after it
            self._unsent = self.replica.push.message.clone()
        elif not self.control.stop:
            self._send_message(self.replica.push.message)

    def _send_message(self, message: Tensor) -> None:
        self._overlapping = self.config.overlap
        if self._overlapping:
            message = self._outgoing.copy_(message)
        self._sent, self._reported, self._pushed = replace(self.place), 0, True
        self._waiting = self.communicator.request(message, self._landing, CONTROL_BYTES, self._overlapping)

    @property
    def _landing(self) -> Tensor:
        return self._incoming if self.config.overlap else self._pull.message

    def _receive(self, contributed: bool) -> None:
        if self._waiting and (not self.config.overlap or self.status.done):
            self._receive_answer(later=not (self.config.overlap or self.status.call))  # not within a step
        self._left = self.communicator.clock()

    def _receive_answer(self, later: bool = False) -> bool:
        """Receive the answer, and take part in a checkpoint if it demands one; then ask again, to wait for the checkpoint.

        Args:
            later: whether to take part only when the script has finished its step.

        Returns:
            Whether it has asked again.
        """
        asked = False
        while self._waiting:
            waiting, self._waiting = self._waiting, None
            self._take(waiting())
            if self.control.checkpoint and later:
                self._checkpoint_due = True
            elif self.control.checkpoint:
                self.save()
            if self.control.fault:
                raise CallError(broadcast_bytes(self.communicator, b"").decode())
            self.replica.check_finite(self.control)
            if self.control.again and not self._checkpoint_due:
                asked = True
                self._post_request(not self._elastic, busy=False)
        if self._overlapping and self.control.stop:  # what has been computed meanwhile will be computed again
            self.place.taken, self.place.samples, self.place.calls = self._sent.taken, self._sent.samples, self._sent.calls
            self.replica.flat.clear()
        self._overlapping = False
        return asked

    def _take(self, whole: bool) -> None:
        pull, pushed = self._pull, self._pushed
        self._pushed = False
        if self.config.overlap:
            length = self._incoming.numel() if whole else CONTROL_BYTES
            pull.message[:length].copy_(self._incoming[:length])
        self.control = control = pull.control
        if whole:
            self.version = int(control.version)
            if not self._elastic:
                self.update.received()
            self.replica.flat.note_weights(moved=not self.update.apart, others=not self.update.apart)
        if (whole or pushed) and not self._elastic:  # the answer holds the statistics of buffered contributions, too
            self.replica.buffers.load(pull.buffers)
        if control.ticket >= 0:
            self._granted.append(int(control.ticket))

    def _restore(self, mine: RankState) -> None:
        super()._restore(mine)
        if mine.ahead:
            self._unsent, self._ahead = mine.ahead.get("message"), int(mine.ahead["used"])
            self._sent = Place(**mine.ahead["sent"])

    def state(self, chief: int | None = None) -> RankState:
        """Return this worker's state, with what it has computed since its last push; see `Worker`."""
        state = super().state(chief)
        if self._unsent is not None:
            message = self._unsent.clone()
            row = message[-len(self.replica.push.columns) :]
            row[SIGNAL] = row[STOP] = 0  # these end this run, not the resumed one
            state.own["ahead"] = {"tickets": int(row[TICKETS]), "used": 0, "sent": asdict(self._sent), "message": message}
        elif self._ahead or (self._overlapping and (self.used or self._working)):
            used = self._ahead or self.used
            state.own["ahead"] = {"tickets": used, "used": used, "sent": asdict(self._sent)}
        return state
