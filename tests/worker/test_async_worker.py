"""The worker's side of the requests: what it sends, when, and what it keeps from its answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mpips
from mpips.comm import SERVER, Communicator, CommunicatorError
from mpips.comm.simulated import World
from mpips.config import Config, Local, Staleness
from tests.server.test_parameter_server import ASYNC, counter, push, run_and_stop, serve_and, set_gradients

OVERLAP = Config(mode="async", overlap=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def test_two_calls() -> None:
    def work(client: mpips.Client) -> list[float]:
        seen = []
        for _ in range(3):
            set_gradients(client)
            client.push(0.5, samples=4)
            control = client.pull()
            seen += [
                float(client.replica.flat.weights[0]),
                control.loss,
                sum(p.grad is not None for p in client.replica.flat.parameters),
            ]
            assert client.version == control.version
        client.close()
        return seen

    assert World(2).run(serve_and(work, run_and_stop))[1] == [1, 0.5, 1, 2, 0.5, 1, 3, 0.5, 1]


def test_with_overlap_the_answer_is_heard_with_the_next_push() -> None:
    def work(client: mpips.Client) -> list[float]:
        seen = []
        for _ in range(4):
            push(client)
            seen.append(float(client.replica.flat.weights[0]))
        client.ask()
        seen.append(float(client.replica.flat.weights[0]))
        client.close()
        return seen

    assert World(2).run(serve_and(work, run_and_stop, config=OVERLAP)) == [4.0, [0, 1, 2, 3, 4]]


def test_a_stop_heard_with_overlap_drops_what_nobody_would_take() -> None:
    def work(client: mpips.Client) -> float:
        for _ in range(50):
            push(client)
        client.finish()
        client.close()
        assert client.control.stop
        return client.control.version

    def serve(server: mpips.ParameterServer) -> float:
        server.stop()
        return float(server.replica.flat.weights[0])

    assert World(3).run(serve_and(work, serve, config=OVERLAP)) == [2.0, 2, 2]


def test_pulls_do_not_disturb_what_is_being_computed() -> None:
    """Neither gradients that wait, nor local steps, nor the row of a push that is written."""

    def work(client: mpips.Client) -> None:
        if client.index:
            for _ in range(5):
                push(client)
            client.close()
            return
        weight = client.replica.flat.parameters[0]
        (-weight).sum().backward()
        before = weight.item()
        client.ask()
        assert (weight.grad, weight.item()) == (torch.tensor([[-1.0]]), before)
        (-weight).sum().backward()
        client.push(0.0, 1)
        client.pull()
        client.close()

    assert World(3).run(serve_and(work, run_and_stop))[SERVER] == 7


@pytest.mark.parametrize("seed", range(5))
def test_a_ticket_asked_for_between_local_steps_leaves_them(seed: int) -> None:
    """Others push meanwhile, so that there are new weights to be had."""
    config = Config(mode="fedbuff", local=Local(steps=3), staleness=Staleness(buffer=1, policy="none"))
    world = World(3, seed=seed)

    def program(e: Communicator) -> Any:
        model = counter()
        if e.rank == SERVER:
            server = mpips.ParameterServer(e, model, sgd, config=config)
            server.start()
            return run_and_stop(server)
        client = mpips.Client(e, model, config, optimizer=sgd)
        client.receive_initial_weights()
        for step in range(6):
            client.next_ticket()
            world.sleep(e.rank, 1.0 + (e.rank == 1) * step)
            own = float(client.replica.flat.weights[0])
            model.zero_grad()
            (-model.weight).sum().backward()  # type: ignore[operator,union-attr]
            client.step(0.0, 1)
            if step % 3 < 2:
                assert float(client.replica.flat.weights[0]) == own + 1
        client.close()
        return None

    assert world.run(program)[SERVER] == 12


def test_with_overlap_a_batch_is_dealt_ahead() -> None:
    """So that nobody waits for a number: one request for each push, after the first."""

    def work(client: mpips.Client) -> tuple[list[int | None], int]:
        client.begin()
        tickets = []
        for _ in range(10):
            tickets.append(client.next_ticket())
            client.used = 1
            push(client)
        calls = client.communicator.traffic["request calls"]
        client.close()
        return tickets, calls

    _, (tickets, calls) = World(2).run(serve_and(work, run_and_stop, config=OVERLAP))
    assert tickets == list(range(10))
    assert calls == 12


def test_a_worker_that_closes_gives_its_batches_back() -> None:
    world = World(3)

    def work(client: mpips.Client) -> list[int | None]:
        if client.index == 0:
            ticket = client.next_ticket()
            client.close()
            return [ticket]
        world.sleep(2, 5.0)
        tickets = [client.next_ticket() for _ in range(3)]
        client.close()
        return tickets

    assert world.run(serve_and(work, run_and_stop))[1:] == [[0], [0, 1, 2]]


def test_nothing_else_may_use_the_exchange_while_a_push_travels() -> None:
    def work(client: mpips.Client) -> None:
        push(client)
        with pytest.raises(CommunicatorError, match="before it has taken the answer"):
            client.communicator.broadcast(torch.zeros(1))
        client.close()

    World(2).run(serve_and(work, run_and_stop, config=OVERLAP))


def test_a_second_push_before_the_pull_waits_for_the_first() -> None:
    def work(client: mpips.Client) -> None:
        for _ in range(3):
            set_gradients(client)
            client.push(0.0, 1)
        client.pull()
        client.close()

    assert World(2).run(serve_and(work, run_and_stop, config=ASYNC))[SERVER] == 3
