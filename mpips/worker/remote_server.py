"""The server on another rank, as a worker calls it: a method does this rank's part of what the server does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpips.algorithms.modes import Mode
from mpips.comm import Communicator, broadcast_bytes
from mpips.config import Config
from mpips.data import Place
from mpips.model.message import Call, CallError, Control, Replica
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.reduce.choice import choose_transport
from mpips.reduce.transport import Transport
from mpips.rules import choose
from mpips.server import contract
from mpips.server.rank_state import RankState


class RemoteServer:
    """The server, seen from a rank that does not serve.

    Args:
        communicator: this rank's end.
        replica: this rank's copy of the model.
        config, mode: the settings, and the row of MODES.
        inner: the optimizer of this worker's local steps; None in modes without.
        optimizer: the server's optimizer, for the slices that this rank serves; None if this rank was given none.
        terms: the contract's lines about the optimizer.

    Attributes:
        transport: moves the messages of a round; set by `begin`.
        control: the server's latest control.
        states: the ranks' packed states of a resumed run; else empty.
        place, worker_state, told_state: as in `Serving`.
    """

    transport: Transport

    def __init__(
        self,
        communicator: Communicator,
        replica: Replica,
        config: Config,
        mode: Mode,
        inner: FlatOptimizer | None,
        optimizer: FlatOptimizer | None,
        terms: Sequence[str],
    ) -> None:
        self.communicator, self.replica, self.config, self.mode = communicator, replica, config, mode
        self.inner, self.optimizer, self._terms = inner, optimizer, terms
        self.control = Control()
        self.states = b""
        self.place = Place()
        self.worker_state: Callable[[int | None], RankState] | None = None
        self.told_state: dict[str, Any] = {}

    def begin(self) -> None:
        """Agree with all ranks on the contract, receive the server's weights, and choose the transport.

        Raises:
            ContractError: the ranks do not agree.
        """
        contract.begin(self.communicator, self.replica, self.config, self._terms)
        self.states = broadcast_bytes(self.communicator, b"")
        given = self.replica, self.config, self.mode, self.optimizer, *choose(self.config)
        self.transport = choose_transport(self.communicator, *given, serves=False)
        self.optimizer = None  # the transport has taken it over
        if self.inner:
            self.inner.rebind()
        self.control = self.replica.pull.control

    def round(self, contributed: bool = True) -> Control:
        """Do this rank's part of a round; see `Server.round`."""
        version, chief = self.control.version, self.control.chief
        self.transport.reduce(self.control.round)
        self.transport.decide()
        self.transport.pull()
        self.control = control = self.replica.pull.control
        if control.fault:
            raise CallError(broadcast_bytes(self.communicator, b"").decode())
        self.replica.check_finite(control)
        if self.replica.buffers.names and (contributed or control.version > version):
            # else the worker that gives the integers of all may have died before it did; clients begin from the server's
            written = control.chief == chief or self.mode.federated
            self.replica.buffers.load(self.replica.pull.buffers, integers=written)
        if control.call == Call.STATE:
            self.told_state = self._receive_state()
        return control

    def _receive_state(self) -> dict[str, Any]:
        """Do this rank's part of `Service.tell_state`, and return the optimizer's state."""
        self.communicator.gather_bytes(*RankState(-1, Place(), {}, slices=self.transport.optimizer_shard()).parts())
        return RankState.unpack(broadcast_bytes(self.communicator, b"")).own

    def average(self) -> None:
        """Do this rank's part of `Server.average`."""
        self.transport.average()

    def exchange_call(self, given: bytes) -> dict[str, Any]:
        """Send this worker's arguments to a call, and return the server's reply; see `Service.exchange_call`."""
        self.communicator.gather_bytes(given)
        reply: dict[str, Any] = json.loads(broadcast_bytes(self.communicator, b""))
        self.control.stop = reply["stop"]
        return reply

    def carry_out(self, reply: Mapping[str, Any]) -> None:
        """Do this rank's part of the checkpoint, and wait for the results; see `Service.carry_out`."""
        if reply["save"]:
            self.save_model()
        if reply["finish"]:
            self.give_performance()
        if reply["finish"] or reply["awaited"]:
            broadcast_bytes(self.communicator, b"")  # DONE, or the checkpoint, is written

    def save_model(self) -> None:
        """Send this rank's state for a checkpoint, and again if the server asks for it; see `Service.save_model`."""
        assert self.worker_state
        chief: int | None = None
        while True:
            self.communicator.gather_bytes(*self.worker_state(chief).parts())
            if not self.config.min_workers or not (told := broadcast_bytes(self.communicator, b"")):
                return
            chief = int(told)

    def give_performance(self) -> None:
        """Send this rank's traffic to the server, at the end of the run."""
        self.communicator.gather_bytes(json.dumps(self.communicator.traffic).encode())

    def receive_control(self) -> Control:
        """Receive and return the control that the server sends between rounds; see `Service.send_stop_signal`."""
        self.transport.tell()
        self.control = self.replica.pull.control
        return self.control
