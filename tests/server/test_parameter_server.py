"""The server that answers requests, by hand: every method, on simulated ranks and over MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mpips
from mpips.comm import SERVER, Communicator
from mpips.comm.simulated import World
from mpips.config import Config, ConfigError, Staleness
from mpips.model.message import CONTROL_BYTES, NonFiniteError, Stop
from mpips.server.parameter_server import BatchQueue, UpdateBuffer
from mpips.server.parameter_server.worker_table import WorkerTable
from tests.comm.test_mpi import on_mpi
from tests.helpers.programs import mlp, sha

Work = Callable[[mpips.Client], Any]
ASYNC = Config(mode="async")


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def counter() -> nn.Module:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def set_gradients(client: mpips.Client, value: float = -1.0) -> None:
    """As backward would leave them."""
    for p in client.replica.flat.parameters:
        p.grad = torch.full_like(p, value)


def push(client: mpips.Client, gradient: float = -1.0) -> None:
    """A contribution that adds 1 to each weight of the server, with SGD and learning rate 1."""
    set_gradients(client, gradient)
    client.push(0.0, 1)
    client.pull()


def serve_and(
    work: Work,
    serve: Callable[[mpips.ParameterServer], Any],
    model: Callable[[], nn.Module] = counter,
    config: Config = ASYNC,
) -> Callable[[Communicator], Any]:
    """`serve` on rank 0, after `start`; `work` on every other rank, with the first weights."""

    def program(e: Communicator) -> Any:
        if e.rank == SERVER:
            server = mpips.ParameterServer(e, model(), sgd, config=config)
            server.start()
            return serve(server)
        client = mpips.Client(e, model(), config)
        client.receive_initial_weights()
        return work(client)

    return program


def run_and_stop(server: mpips.ParameterServer) -> float:
    server.run()
    version = server.stop()
    assert version == server.stop(), "once more changes nothing"
    return float(server.replica.flat.weights[0])


def five(client: mpips.Client) -> None:
    for _ in range(5):
        push(client)
    client.close()
    client.close()


@pytest.mark.parametrize("seed", range(5))
def test_every_push_is_taken_exactly_once(seed: int) -> None:
    assert World(4, seed=seed).run(serve_and(five, run_and_stop))[SERVER] == 15


@pytest.mark.mpi(min_size=2)
def test_every_push_over_mpi_is_taken_exactly_once() -> None:
    results = on_mpi(serve_and(five, run_and_stop))
    assert results[SERVER] == 5 * (len(results) - 1)


@pytest.mark.parametrize("seed", range(5))
def test_stop_before_run_takes_what_was_sent_and_tells_everybody(seed: int) -> None:
    def work(client: mpips.Client) -> float:
        for _ in range(100):
            push(client)
            if client.control.stop:
                break
        before = client.communicator.traffic["request calls"]
        push(client)  # nobody listens: nothing is sent
        client.close()
        assert client.communicator.traffic["request calls"] == before
        return client.control.version

    def serve(server: mpips.ParameterServer) -> tuple[int, float]:
        version = server.stop()
        assert server.control.stop == Stop.REQUESTED
        return version, float(server.replica.flat.weights[0])

    served, *worked = World(4, seed=seed).run(serve_and(work, serve))
    assert served == (3, 3.0)
    assert worked == [3, 3, 3]


def test_start_again_after_stop_with_the_same_workers() -> None:
    def work(client: mpips.Client) -> None:
        for life in range(3):
            if life:
                client.receive_initial_weights()
            while not client.control.stop:
                push(client)

    def serve(server: mpips.ParameterServer) -> list[float]:
        seen = []
        for life in range(3):
            if life:
                server.start()
            seen.append((server.stop(), float(server.replica.flat.weights[0])))
        return seen

    assert World(3).run(serve_and(work, serve))[SERVER] == [(2, 2.0), (4, 4.0), (6, 6.0)]


def test_start_of_a_server_that_runs_stops_it_first() -> None:
    def work(client: mpips.Client) -> None:
        push(client)
        assert client.control.stop
        client.receive_initial_weights()
        five(client)

    def serve(server: mpips.ParameterServer) -> float:
        server.start()
        return run_and_stop(server)

    assert World(3).run(serve_and(work, serve))[SERVER] == 12


def test_stop_from_another_thread_waits_until_all_are_told() -> None:
    versions: list[int] = []

    def work(client: mpips.Client) -> None:
        while not client.control.stop:
            push(client)

    def serve(server: mpips.ParameterServer) -> None:
        taken = server.update_parameters
        threads: list[threading.Thread] = []

        def update_parameters(*given: Any) -> bool:
            if server.control.version == 7:
                threads.append(threading.Thread(target=lambda: versions.append(server.stop())))
                threads[-1].start()
                while not server.stop_asked:
                    pass
            return taken(*given)

        server.update_parameters = update_parameters  # type: ignore[method-assign]
        server.run()
        threads[0].join()
        assert versions == [server.control.version]

    World(3).run(serve_and(work, serve))
    assert versions[0] >= 8


def test_stop_from_a_validation_only_notes_the_wish() -> None:
    def work(client: mpips.Client) -> None:
        client.finish()
        client.receive_control()
        assert client.control.stop == Stop.REQUESTED

    def serve(server: mpips.ParameterServer) -> None:
        server.run()
        server.validate(lambda: float(server.stop()))
        server.send_stop_signal()

    World(3).run(serve_and(work, serve))


def test_a_loop_ends_when_all_are_done_and_another_may_follow() -> None:
    def work(client: mpips.Client) -> int:
        for _ in range(2):
            client.begin()
            for _ in range(client.index + 1):
                push(client)
            client.finish()
        client.close()
        return client.version

    def serve(server: mpips.ParameterServer) -> float:
        server.run()
        return run_and_stop(server)

    assert World(4).run(serve_and(work, serve)) == [12.0, 12, 12, 12]


def test_an_answer_to_a_pull_is_short_unless_there_is_something_new() -> None:
    def work(client: mpips.Client) -> None:
        for _ in range(3):
            client.ask()
        push(client)
        client.ask()
        client.close()

    def serve(server: mpips.ParameterServer) -> int:
        server.run()
        return server.communicator.traffic["respond bytes"] - len(server.replica.pull.message)

    assert World(2).run(serve_and(work, serve, mlp))[SERVER] == 5 * CONTROL_BYTES  # and one whole answer, to the push


def test_a_pull_costs_no_gradient() -> None:
    def work(client: mpips.Client) -> int:
        client.ask()
        client.close()
        return client.communicator.traffic["request bytes"]

    _, sent = World(2).run(serve_and(work, run_and_stop, mlp))
    assert sent < 200 * 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", 1 + 1 + 1),
        ("reject", 1 + 1),
        ("inverse", 1 + 1 + 1 / 2),
        ("poly", 1 + 2**-0.5 + 3**-0.5),
        ("hinge", 1 + 1 + 2 / 3),
    ],
)
def test_a_late_push_counts_as_its_policy_says(policy: Any, expected: float) -> None:
    """Three workers compute at version 0; their pushes come with staleness 0, 1 and 2."""
    config = Config(mode="async", staleness=Staleness(policy=policy, bound=1))

    def serve(server: mpips.ParameterServer) -> float:
        weight = run_and_stop(server)
        assert server.summary() == {
            "staleness": {"0": 1, "1": 1} if policy == "reject" else {"0": 1, "1": 1, "2": 1},
            "rejected": int(policy == "reject"),
        }
        return weight

    def work(client: mpips.Client) -> None:
        push(client)
        client.close()

    assert World(4).run(serve_and(work, serve, config=config))[SERVER] == pytest.approx(expected, rel=1e-15)


def test_delay_compensation_knows_the_weights_of_a_worker_that_overlaps() -> None:
    """g + lambda g^2 (w - w_k), where w_k are the weights before the last that were sent."""
    config = Config(mode="async", overlap=True, staleness=Staleness(policy="dc", strength=0.5))

    def work(client: mpips.Client) -> None:
        for _ in range(4):
            push(client)
        client.close()

    def serve(server: mpips.ParameterServer) -> float:
        server.run()
        return float(server.replica.flat.weights[0])

    weights = [0.0]
    for step in range(4):
        at = weights[max(step - 1, 0)]  # the answer to the last push was not there yet
        weights.append(weights[-1] - (-1 + 0.5 * (weights[-1] - at)))
    assert World(2).run(serve_and(work, serve, config=config))[SERVER] == pytest.approx(weights[-1], rel=1e-15)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "mode", [{"mode": "async"}, {"mode": "ssp"}, {"backup_workers": 1}, {"mode": "async", "overlap": True}]
)
def test_a_nan_is_raised_on_every_rank(seed: int, mode: dict[str, Any]) -> None:
    raised = []
    world = World(4, seed=seed)

    def work(client: mpips.Client) -> None:
        for step in range(9):
            world.sleep(client.communicator.rank, client.communicator.rank)
            push(client, float("nan") if client.index == 1 and step == 3 else -1.0)
        client.finish()

    def program(e: Communicator) -> None:
        try:
            serve_and(work, lambda server: server.run(), config=Config(**mode))(e)
        except NonFiniteError as error:
            raised.append(str(error))

    world.run(program)
    assert len(raised) == 4
    assert set(raised) == {raised[0]}
    assert "rank 2 has a NaN or Inf in the gradient of weight" in raised[0]


@pytest.mark.parametrize("nonfinite", ["drop", "skip"])
@pytest.mark.parametrize("mode", [{"mode": "async"}, {"backup_workers": 1}, {"backup_workers": 2}])
def test_nans_of_all_workers_hold_nobody(nonfinite: Any, mode: dict[str, Any]) -> None:
    def work(client: mpips.Client) -> None:
        for step in range(6):
            push(client, float("nan") if step % 2 else -1.0)
        client.finish()

    def serve(server: mpips.ParameterServer) -> float:
        server.run()
        return float(server.replica.flat.weights[0])

    weight = World(4).run(serve_and(work, serve, config=Config(nonfinite=nonfinite, **mode)))[SERVER]
    assert weight == 9 if mode == {"mode": "async"} else weight >= 1


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"backup_workers": 2}, {"mode": "ssp", "overlap": True, "staleness": Staleness(bound=0)}):
        with pytest.raises(ConfigError, match="backup_workers" if "backup_workers" in settings else "overlap"):
            mpips.ParameterServer(World(3).ends[0], counter(), sgd, config=Config(**settings))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of an optimizer whose step nobody calls here
def test_any_optimizer_clip_and_scheduler() -> None:
    """One worker: the bits of the plain loop."""
    torch.manual_seed(5)
    gradients = torch.randn(20, 599)
    config = Config(mode="async", clip=0.5)

    def made(model: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def assign(model: nn.Module, step: int) -> None:
        at = 0
        for p in model.parameters():
            p.grad = gradients[step, at : at + p.numel()].view_as(p).clone()
            at += p.numel()

    def program(e: Communicator) -> str:
        model = mlp()
        if e.rank == SERVER:
            server = mpips.ParameterServer(e, model, made(model)[0], config=config, follows=True)
            server.start()
            server.run()
            return sha(model)
        optimizer, scheduler = made(model)
        client = mpips.Client(e, model, config, optimizer=optimizer, tells=True)
        client.receive_initial_weights()
        for step in range(20):
            assign(model, step)
            client.step(0.0, 1)
            scheduler.step()
        client.close()
        return sha(model)

    plain = mlp()
    optimizer, scheduler = made(plain)
    for step in range(20):
        assign(plain, step)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    assert World(2).run(program) == [sha(plain)] * 2


def test_dealing() -> None:
    dealing = BatchQueue([1, 2])
    assert [dealing.deal(1), dealing.deal(2), dealing.deal(1)] == [0, 1, 2]
    dealing.used(1, 1)
    dealing.give_back(1)
    assert [dealing.deal(2), dealing.deal(2)] == [2, 3], "what came back goes first"
    assert dealing.state_dict() == {"next": 4, "waiting": [], "dealt": {"2": [1, 2, 3]}}
    other = BatchQueue([1])
    other.load_state_dict(dealing.state_dict(), {})
    assert [other.deal(1) for _ in range(4)] == [1, 2, 3, 4]
    again = BatchQueue([1, 2])
    again.load_state_dict(dealing.state_dict(), {2: 2})
    assert [again.deal(1), again.deal(1)] == [3, 4], "the first two are used up for what goes on"
    again.used(2, 2)
    assert again.state_dict() == {"next": 5, "waiting": [], "dealt": {"1": [3, 4]}}
    dealing.clear()
    assert dealing.deal(1) == 0


@pytest.mark.parametrize("by_share", [True, False])
def test_kept_contributions_and_their_buffers(by_share: bool) -> None:
    from mpips.comm.simulated import World
    from mpips.model.message import replicate
    from tests.helpers.programs import cnn

    replica = replicate(cnn(), Config(), 1, World(1).ends[0].allocate)
    push, kept = replica.push, UpdateBuffer(replica.push)
    for value, share in ((2.0, 0.5), (6.0, 0.25)):
        push.body.fill_(value)
        push.limbs.fill_(value)
        kept.add(share)
    saved, again = kept.state_dict(), UpdateBuffer(push)
    again.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved.items()})
    again.take(by_share)
    assert push.gradients[0] == (2.5 / 0.75 if by_share else 2.5 / 2)
    assert push.floats[0] == torch.tensor(2.5 / 0.75), "statistics are no steps"
    assert push.limbs[0] == 6
    assert again.count == 0


def test_the_queue_deals_out_again_what_a_dead_rank_has_not_pushed() -> None:
    queue = BatchQueue([1, 2])
    assert [queue.deal(1) for _ in range(4)] == [0, 1, 2, 3]
    queue.used(1, 2)  # pushed
    queue.used(1, 1, pushed=False)
    queue.lose(1)
    assert queue.left_by_dead == 2
    assert [queue.deal(2) for _ in range(3)] == [2, 3, 4]
    assert queue.left_by_dead == 0


def test_the_queue_knows_which_batches_of_the_dead_nobody_takes() -> None:
    """Numbers beyond the last batch, which a rank returns at its end, are none."""
    queue = BatchQueue([1, 2, 3])
    assert [queue.deal(rank) for rank in (1, 2, 3, 2, 3)] == [0, 1, 2, 3, 4]
    for rank in (2, 3):  # there are three batches
        queue.used(rank, 1)
        queue.give_back(rank)
    queue.lose(1)
    assert queue.left_by_dead == 1
    queue.end_loop(over=True)
    assert queue.left_by_dead == 0


def test_a_dead_worker_is_waited_for_in_nothing() -> None:
    table = WorkerTable([1, 2, 3])
    table.open, table.clocks = {1, 2, 3}, {1: 5, 2: 9, 3: 7}
    table.rows[1], table.held, table.told = {"done": 0.0, "stop": 0.0, "want": 0.0}, {1, 2}, {1}
    table.lose(1)
    assert (table.open, table.held, table.told, table.present, table.training) == ({2, 3}, {2}, set(), {2, 3}, {2, 3})
    assert table.slowest == 7
    assert 1 not in table.rows
