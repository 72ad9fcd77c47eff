"""A worker of the server that answers requests: it pulls when it likes and pushes when it is ready.

    push  update.write, communicator.request    on its way at once; with `overlap` the next update is computed meanwhile
    pull  the answer                    what is new, or that nothing is; also the acknowledgement of the push

Everything else is `Worker`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from mpips.algorithms.easgd import EASGD
from mpips.comm import broadcast_bytes
from mpips.data import Place
from mpips.model.message import CONTROL_BYTES, ROUNDS, SIGNAL, STOP, TICKETS, Call, CallError, Control, WorkerStatus
from mpips.server.parameter_server.request import BATCH, BUSY, BYE, WEIGHTS
from mpips.server.rank_state import RankState
from mpips.worker.round_worker import Worker


class Client(Worker):
    """One worker of a `ParameterServer`; see `Worker` for its arguments.

    Once the server has told it to stop, nobody listens: what it would still send is dropped, and every call returns at once.

    Attributes:
        version: the version of the weights in the model.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.version = 0
        push, pull = self.replica.push, self.replica.pull
        self._elastic = self.update if isinstance(self.update, EASGD) else None
        self._pull = self._elastic.centre if self._elastic else pull  # where answers land
        self._request = push.message[push.tail_at :].clone()  # of a pull: the push message is never touched by one
        self._outgoing = self._incoming = push.message[:0]
        if self.config.overlap:
            self._outgoing, self._incoming = push.message.clone(), pull.message.clone()
        self._waiting: Callable[[], bool] | None = None
        self._pushed = False  # whether what it waits for is the answer to a push
        self._beside = False  # whether what it waits for is the answer to a push, while the next update is computed
        self._sent = replace(self.place)  # where it was when the last push left
        self._composed = False  # whether the push message is written and waits for the answer to the one before it
        self._unsent: Tensor | None = None  # such a message, of a run that is resumed
        self._ahead = 0  # batches used up for what is to be pushed, of a run that is resumed
        self._granted: deque[int] = deque()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._granted.clear()
        self._draws = False  # whether batches are dealt out to it
        self.used = self._reported = 0  # batches used since the last push, and those of them that the server knows of

    def receive_initial_weights(self) -> None:
        """See `Worker`; also how a worker begins again when the server does."""
        self.done, self.stop = False, 0
        super().receive_initial_weights()
        self.version = int(self.control.version)
        if self._elastic:
            self._pull.control = self.control
        if self._unsent is None and not self._ahead:  # else as the checkpoint has it
            self._sent = replace(self.place)
        self._begin_anew()

    def step(self, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> Control:
        """See `Worker`."""
        self.pay()
        if self.control.stop:
            self.replica.flat.clear()
            return self.control
        self._ask_for_centre()
        return super().step(loss, samples, metrics, taken)

    def push(self, loss: float, samples: float, metrics: Sequence[float] = (), taken: int = 0) -> None:
        """See `Worker`; `pull` takes the answer. Without `overlap` nothing may be computed before that."""
        self.pay()
        if self.control.stop:
            self.replica.flat.clear()
            return
        self._ask_for_centre()
        super().push(loss, samples, metrics, taken)

    def _ask_for_centre(self) -> None:
        """Where the step at hand gives way to the spring: from the centre as it is now."""
        if self._elastic and self._elastic.about_to_push():
            self._before_push(self.ask)

    def _before_push(self, call: Callable[[], object]) -> None:
        """What is said now does not say yet that the shard is exhausted."""
        done, self.done = self.done, False
        call()
        self.done = done

    def ask(self, weights: bool = True) -> Control:
        """Pull: the newest weights, if they are not here already and nothing has been computed that is to be pushed.

        Args:
            weights: False if they are not needed.
        """
        self.pay()
        if self._waiting:  # the answer to the last push is on its way
            self._hear()
        if not self.control.stop or self.call:
            self._post_request(weights, busy=not self.done)
            self._hear()
        return self.control

    def next_ticket(self) -> int | None:
        """The number of the next batch for this worker; None when the run is to stop."""
        self.pay()
        self._draws = True
        if self._waiting and not self._granted:
            self._hear()
        while len(self._granted) < 1 + (self.config.overlap and not self._waiting) and not self.control.stop:
            self.ask(weights=not self._elastic)
        return None if self.control.stop else self._granted.popleft()

    def begin(self) -> None:
        """See `Worker`."""
        super().begin()
        self._begin_anew()
        self.used, self._ahead = self._ahead, 0

    def settle(self) -> None:
        """See `Worker`; a resumed run sends what was written and not sent before anything new is computed."""
        super().settle()
        if self._unsent is not None:
            message, self._unsent = self._unsent, None
            self._send_message(message)

    def pay(self) -> None:
        """See `Worker`; then this worker asks again, for it may not go on before the checkpoint is written."""
        if self._owes:
            super().pay()
            self._post_request(not self._elastic, busy=False)
            self._hear()

    def barrier(self, call: Call) -> None:
        """See `Worker`."""
        self.pay()
        if self._waiting:
            self._before_push(self._hear)  # the request that says it is the end is still to come
        if call != Call.LOOP or not self.control.stop:
            super().barrier(call)

    def close(self) -> None:
        """Say good-bye: the server waits for this worker no more. What local steps have led to is pushed first."""
        self.pay()
        if self._waiting:
            self._hear()
        if self.control.stop or self.stop == BYE:
            return
        self.done, self.stop = True, BYE
        self.idle()

    def idle(self) -> Control:
        """See `Worker`; without anything to push it is a pull."""
        self.pay()
        if self.update.pending and not self.control.stop:
            self._push()
            return self.pull()
        self._begun, self._told = self.communicator.clock(), self.done
        self.ask()
        self._left = self.communicator.clock()
        return self.control

    def _row(self, samples: float = 0, loss: float = 0) -> WorkerStatus:
        row = super()._row(samples, loss)
        row.round, row.tickets, row.want = self.version % ROUNDS, self.used, WEIGHTS * self.update.wants_weights
        if self._draws and not self.done and len(self._granted) < 1 + self.config.overlap:
            row.want += BATCH
        self._reported, self.used = self._reported + self.used, 0
        return row

    @property
    def _working(self) -> bool:
        """Whether gradients or steps have been computed that are not pushed."""
        return self.update.pending or self.replica.flat.pending or self._unsent is not None

    def _post_request(self, weights: bool, busy: bool) -> None:
        """A pull; new weights would spoil what has been computed at those that are here."""
        busy = busy and bool(self.used or self._reported or self._working)
        weights = weights and (bool(self._elastic) or not self._working)
        row = self._row()
        row.want = (int(row.want) & BATCH) + BUSY * busy + WEIGHTS * weights
        values = [*vars(row).values(), *[0.0] * len(self.config.metrics)]
        self._request[len(self._request) - len(values) :].copy_(self._request.new_tensor(values))
        self._waiting = self.communicator.request(self._request, self._landing, CONTROL_BYTES)

    def _push(self) -> None:
        if self._waiting and not self._beside:
            self._hear()
        super()._push()

    def _send(self) -> None:
        self._begun, self._told = self.communicator.clock(), self.done
        if self._waiting:
            self._composed = True
            self._before_push(self._hear)
            self._composed = False
        if not self.control.stop:
            self._send_message(self.replica.push.message)

    def _send_message(self, message: Tensor) -> None:
        self._beside = self.config.overlap
        if self._beside:
            message = self._outgoing.copy_(message)
        self._sent, self._reported, self._pushed = replace(self.place), 0, True
        self._waiting = self.communicator.request(message, self._landing, CONTROL_BYTES, self._beside)

    @property
    def _landing(self) -> Tensor:
        return self._incoming if self.config.overlap else self._pull.message

    def _receive(self, contributed: bool) -> None:
        if self._waiting and (not self.config.overlap or self.done):
            self._hear(later=not (self.config.overlap or self.call))  # in a step, of which the script has not done all
        self._left = self.communicator.clock()

    def _hear(self, later: bool = False) -> None:
        """Take the answer. A checkpoint is written if it says so; then this worker asks again, for it may not go on yet.

        Args:
            later: give its part of the checkpoint when the script has done what follows a step.
        """
        while self._waiting:
            waiting, self._waiting = self._waiting, None
            self._take(waiting())
            if self.control.checkpoint and later:
                self._owes = True
            elif self.control.checkpoint:
                self.save()
            if self.control.fault:
                raise CallError(broadcast_bytes(self.communicator, b"").decode())
            self.replica.check_finite(self.control)
            if self.control.again and not self._owes:
                self._post_request(not self._elastic, busy=False)
        if self._beside and self.control.stop:  # what has been computed beside will be again
            self.place.taken, self.place.samples = self._sent.taken, self._sent.samples
            self.replica.flat.clear()
        self._beside = False

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
        if (whole or pushed) and not self._elastic:  # what a contribution that is kept has made of the statistics is in it
            self.replica.buffers.load(pull.buffers)
        if control.ticket >= 0:
            self._granted.append(int(control.ticket))

    def _restore(self, mine: RankState) -> None:
        super()._restore(mine)
        if mine.ahead:
            self._unsent, self._ahead = mine.ahead.get("message"), int(mine.ahead["used"])
            self._sent = Place(**mine.ahead["sent"])

    def state(self) -> RankState:
        """See `Worker`; with what has been computed beside the last push, and where this worker was when that left."""
        state, message = super().state(), self.replica.push.message if self._composed else self._unsent
        if message is not None:
            message = message.clone()
            row = message[-len(self.replica.push.columns) :]
            row[SIGNAL] = row[STOP] = 0  # which end this run, not the one that goes on
            state.own["ahead"] = {"tickets": int(row[TICKETS]), "used": 0, "sent": asdict(self._sent), "message": message}
        elif self._ahead or (self._beside and (self.used or self._working)):
            used = self._ahead or self.used
            state.own["ahead"] = {"tickets": used, "used": used, "sent": asdict(self._sent)}
        return state
