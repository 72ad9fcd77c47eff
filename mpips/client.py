"""A worker of the server that answers requests: it pulls when it likes and pushes when it is ready.

    push  update.write, exchange.ask    on its way at once; with `overlap` the next update is computed meanwhile
    pull  the answer                    what is new, or that nothing is; also the acknowledgement of the push

Everything else is `Worker`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mpips.elastic import Elastic
from mpips.message import CONTROL_BYTES, ROUNDS, Control, Row
from mpips.worker import Worker


class Client(Worker):
    """One worker of a `ParameterServer`; see `Worker` for its arguments.

    Attributes:
        version: the version of the weights in the model.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.version = 0
        self._granted: deque[int] = deque()
        self._want = True
        self._waiting: Callable[[], bool] | None = None
        elastic = self.update.centre if isinstance(self.update, Elastic) else None
        self._pull = elastic or self.replica.pull  # where answers land
        self._outgoing = self._incoming = self.replica.push.message[:0]
        if self.config.overlap:
            self._outgoing, self._incoming = self.replica.push.message.clone(), self.replica.pull.message.clone()

    def receive_initial_weights(self) -> None:
        """See `Worker`."""
        super().receive_initial_weights()
        self.version = int(self._control.version)
        if isinstance(self.update, Elastic):
            self._pull.message.copy_(self.replica.pull.message)

    def step(self, loss: float, samples: int, metrics: Sequence[float] = (), taken: int = 0) -> Control:
        """See `Worker`."""
        if isinstance(self.update, Elastic) and self.update.about_to_push():
            self.ask()
        return super().step(loss, samples, metrics, taken)

    def ask(self) -> Control:
        """Pull: the newest weights, if they are not here already. Gradients that were not pushed stay."""
        if self._waiting:  # the answer to the last push is on its way
            self._hear()
        self._write_request()
        self._post(False)
        self._hear()
        return self._control

    def next_ticket(self) -> int | None:
        """The number of the next batch for this worker; None when the run is to stop."""
        while not self._granted:
            self.ask()
            if self._control.stop:
                return None
        return self._granted.popleft()

    def begin(self) -> None:
        """See `Worker`."""
        super().begin()
        self._granted.clear()
        self.used = 0

    def finish(self) -> None:
        """See `Worker`."""
        if self._waiting:
            self._hear()
        super().finish()

    def _row(self, samples: float = 0, loss: float = 0) -> Row:
        row = super()._row(samples, loss)
        row.round, row.tickets, row.want = self.version % ROUNDS, self.used, self._want
        self.used = 0
        return row

    def _write_request(self) -> None:
        """The end of the push message alone: gradients accumulate in its body."""
        push = self.replica.push
        push.message[push.tail_at :].zero_()
        push.write(self.exchange.rank, self._row(), [0.0] * len(self.config.metrics))

    def idle(self) -> Control:
        """See `Worker`; without anything to push it is a pull."""
        if self.update.pending:
            self._push()
            return self.pull()
        self._begun, self._told = self.exchange.clock(), self.done
        self.ask()
        self._left = self.exchange.clock()
        return self._control

    def _push(self) -> None:
        self._want = self.update.wants_weights
        super()._push()
        self._want = True

    def _send(self) -> None:
        self._begun, self._told = self.exchange.clock(), self.done
        if self._waiting:
            self._hear()
        self._post(True)

    def _post(self, whole: bool) -> None:
        push, overlap = self.replica.push, self.config.overlap and whole
        message = push.message if whole else push.message[push.tail_at :]
        if overlap:
            message = self._outgoing.copy_(message)
        self._waiting = self.exchange.ask(message, self._landing, CONTROL_BYTES, overlap)

    @property
    def _landing(self) -> Tensor:
        return self._incoming if self.config.overlap else self._pull.message

    def _receive(self, contributed: bool) -> None:
        if not self.config.overlap or self.done:
            self._hear()
        self._left = self.exchange.clock()

    def _hear(self) -> None:
        """Take the answer; write a checkpoint if it says so, and ask again if this worker may not go on yet."""
        assert self._waiting
        waiting, self._waiting = self._waiting, None
        whole = waiting()
        pull = self._pull
        if self.config.overlap:
            length = self._incoming.numel() if whole else CONTROL_BYTES
            pull.message[:length].copy_(self._incoming[:length])
        before, self._control = self._control, pull.control
        control = self._control
        if whole:
            self.version = int(control.version)
            if not isinstance(self.update, Elastic):
                self.replica.buffers.load(pull.buffers)
                self.update.received()
        self.replica.check_finite(control)
        if self.inner and self.config.schedule == "round" and control.version > before.version:
            self.inner.schedule()
        if control.ticket >= 0:
            self._granted.append(int(control.ticket))
        self.place.over = not control.active
        if control.checkpoint:
            self.save()
        if control.again:
            self.ask()
