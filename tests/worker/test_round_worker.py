"""The worker's half of a round, on simulated ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mpips
from mpips.comm.simulated import SimulatedCommunicator, World
from mpips.config import Config
from mpips.worker.round_worker import place_of
from tests.helpers.programs import data, mlp


def beside_a_server(work: Any, size: int = 2) -> list[Any]:
    def program(e: SimulatedCommunicator) -> Any:
        if e.rank == 0:
            server = mpips.Server(e, mlp(), lambda p: torch.optim.SGD(p, lr=0.1))
            server.broadcast_initial_weights()
            return server.start_server()
        worker = mpips.Worker(e, mlp())
        worker.receive_initial_weights()
        return work(worker)

    return World(size).run(program)[1:]


def backward(worker: mpips.Worker) -> float:
    x, y = data(8)
    loss = F.cross_entropy(worker.replica.flat.model(x), y)
    loss.backward()
    return loss.item()


def test_parameters_and_gradients_stay_views_of_the_messages() -> None:
    def work(worker: mpips.Worker) -> None:
        flat, push, pull = worker.replica.flat, worker.replica.push, worker.replica.pull
        for step in range(5):
            worker.status.done = step == 4
            loss = backward(worker)
            left = flat.grad.clone()
            worker.step(loss, 8)
            for slot, p in zip(flat.slots, flat.parameters, strict=True):
                assert p.data_ptr() == pull.weights.data_ptr() + 4 * slot.offset
                assert p.grad is not None
                assert torch.equal(p.grad, slot.view(left)), "until zero_grad, as in plain PyTorch, with one worker"
            flat.clear()
            backward(worker)
            for slot, p in zip(flat.slots, flat.parameters, strict=True):
                assert p.grad is not None
                assert p.grad.data_ptr() == push.gradients.data_ptr() + 4 * slot.offset
            flat.clear()

    beside_a_server(work)


def test_idle_rounds_keep_gradients_that_were_not_pushed() -> None:
    def work(worker: mpips.Worker) -> None:
        backward(worker)
        kept = worker.replica.flat.grad.clone()
        control = worker.idle()
        assert control.version == 0, "nobody contributed"
        assert torch.equal(worker.replica.flat.grad, kept)
        assert kept.any()
        worker.finish()

    beside_a_server(work)


def test_finish_tells_the_server_and_waits_for_all() -> None:
    def work(worker: mpips.Worker) -> float:
        for _ in range(3 * worker.index):
            worker.step(backward(worker), 8)
        worker.finish()
        return worker.control.round

    assert set(beside_a_server(work, size=4)) == {6}, "a round in which all wait does not count"


@pytest.mark.parametrize(
    ("size", "trains", "expected"),
    [(1, False, [(0, 1)]), (3, False, [(-1, 2), (0, 2), (1, 2)]), (2, True, [(0, 2), (1, 2)])],
)
def test_places(size: int, trains: bool, expected: list[tuple[int, int]]) -> None:
    config = Config(server_trains=trains)
    assert [place_of(end, config) for end in World(size).ends] == expected
