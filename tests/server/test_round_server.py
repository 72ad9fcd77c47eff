"""Every method of the server, with its documented meaning, on simulated ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpips
from mpips import checkpoint
from mpips.comm import CommunicatorError
from mpips.comm.simulated import SimulatedCommunicator, World
from mpips.config import Config, EarlyStopping
from mpips.model.buffers import LIMBS
from mpips.model.message import COLUMNS, Stop
from mpips.optim import hyperparameters as hyper
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from mpips.report.run_report import Report
from tests.helpers.programs import data, mlp


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def server_and_workers(
    size: int, serve: Any, steps: int = 4, config: Config | None = None, world: World | None = None, **given: Any
) -> Any:
    """Run `serve(server)` on rank 0 beside plain workers that do `steps` rounds of 8 samples each."""

    def program(e: SimulatedCommunicator) -> Any:
        if e.rank == 0:
            server = mpips.Server(e, mlp(), sgd, config=config, **given)
            server.broadcast_initial_weights()
            return serve(server)
        model = mlp()
        worker = mpips.Worker(e, model, config)
        worker.receive_initial_weights()
        x, y = (t.split(8) for t in data(8 * steps))
        for step in range(steps):
            loss = F.cross_entropy(model(x[step]), y[step])
            loss.backward()
            worker.status.done = step == steps - 1
            control = worker.step(loss.item(), samples=8 * e.rank)
            if control.stop:
                break
        return worker

    return (world or World(size)).run(program)


def alone(config: Config | None = None, **given: Any) -> mpips.Server:
    server = mpips.Server(World(1).ends[0], mlp(), sgd, config=config, **given)
    server.broadcast_initial_weights()
    return server


def test_start_server_serves_until_every_shard_is_exhausted() -> None:
    def serve(server: mpips.Server) -> tuple[int, float]:
        server.start_server()
        return server.get_server_iterations(), server.control.version

    assert server_and_workers(3, serve, steps=5)[0] == (5, 5)


def test_collect_updates_has_samples_and_rows_by_sender() -> None:
    def serve(server: mpips.Server) -> Any:
        updates = server.collect_updates()
        gradient = server.replica.push.gradients.clone()
        server.update_weights(updates)
        server.note(updates)
        server.send_updates()
        return updates, gradient

    (updates, gradient), first, _ = server_and_workers(3, serve, steps=1)
    assert updates.samples == {1: 8.0, 2: 16.0}
    assert updates.epsilons == []
    assert updates.results[2]["done"] == 1
    model = mlp()
    F.cross_entropy(model(data(8)[0]), data(8)[1]).backward()  # both workers saw the same batch: their mean is its gradient
    slots = first.replica.flat.slots
    for slot, p in zip(slots, model.parameters(), strict=True):
        torch.testing.assert_close(slot.view(gradient), p.grad)


@pytest.mark.parametrize("shares", [{}, {"shares": True}, {"shares": True, "devices": [0, 1, 1]}], ids=str)
def test_send_updates_lands_in_every_model_and_takes_weights(shares: dict[str, Any]) -> None:
    def serve(server: mpips.Server) -> None:
        updates = server.collect_updates()
        server.update_weights(updates)
        server.note(updates)
        server.send_updates(torch.full((server.replica.flat.numel,), 0.25))
        assert isinstance(server.transport, SharedMemoryTransport) == bool(shares)

    _, first, second = server_and_workers(3, serve, steps=1, world=World(3, **shares))
    for worker in (first, second):
        assert all((p == 0.25).all() for p in worker.replica.flat.parameters)


def test_stop_server_ends_all_ranks_in_the_same_round() -> None:
    def serve(server: mpips.Server) -> int:
        server.round()
        server.stop_server()
        server.start_server()
        return server.get_server_iterations()

    rounds, *workers = server_and_workers(3, serve, steps=9)
    assert rounds == 2
    assert [(w.control.round, w.control.stop) for w in workers] == [(2, Stop.REQUESTED)] * 2


def test_send_stop_signal_reaches_the_workers_between_rounds() -> None:
    def program(e: SimulatedCommunicator) -> float:
        if e.rank == 0:
            server = mpips.Server(e, mlp(), sgd)
            server.broadcast_initial_weights()
            server.stop_server()
            server.send_stop_signal()
            return server.control.stop
        worker = mpips.Worker(e, mlp())
        worker.receive_initial_weights()
        worker.receive_control()
        return worker.control.stop

    assert World(3).run(program) == [Stop.REQUESTED] * 3


def test_get_queue_is_where_the_server_receives() -> None:
    end = World(1).ends[0]
    assert mpips.Server(end, mlp(), sgd).get_queue() is end


def test_broadcast_initial_weights_makes_all_models_alike() -> None:
    def program(e: SimulatedCommunicator) -> list[torch.Tensor]:
        torch.manual_seed(e.rank)  # every rank begins with weights of its own
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        model[2].requires_grad_(False)
        model[1].running_mean.fill_(e.rank)
        if e.rank == 0:
            mpips.Server(e, model, sgd).broadcast_initial_weights()
        else:
            mpips.Worker(e, model).receive_initial_weights()
        return [t.clone() for t in model.state_dict().values()]

    first, *others = World(3).run(program)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_create_model_needs_no_worker_and_check_requires_grad_reports(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    server = mpips.Server(World(1).ends[0], model, sgd, report=Report(tmp_path))
    server.create_model()
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["trained"], event["frozen"]) == ("trainable", 33 * 5 + 5, 12 * 33 + 33)
    assert event["tensors"] == ["2.weight", "2.bias"]


def test_load_validation_data_is_lazy_once_and_given_to_the_measure() -> None:
    loaded = []
    server = alone(validation_data=lambda: loaded.append(1) or "the data")
    assert loaded == []
    assert server.validate(lambda given: len(given)) == server.validate(lambda given: len(given)) == 8
    assert loaded == [1]


def test_validation_is_in_eval_mode_without_grad_and_restores_the_mode() -> None:
    server = alone()
    modes = []
    server.validate(lambda: modes.append((server.model.training, torch.is_grad_enabled())) or 1.0)
    assert modes == [(False, False)]
    assert server.model.training


@pytest.mark.parametrize(
    ("stop", "values", "expected"),
    [
        (EarlyStopping(patience=2), [1, 2, 2, 2], [False, False, False, True]),
        (EarlyStopping(patience=2), [1, 0, 2, 1, 1], [False, False, False, False, True]),
        (EarlyStopping(patience=1, min_delta=0.5), [1, 1.4], [False, True]),
        (EarlyStopping(patience=1, min_delta=0.5), [1, 1.6, 2.2], [False, False, False]),
        (EarlyStopping(patience=2, mode="min"), [3, 2, 2, 2], [False, False, False, True]),
        (EarlyStopping(target=0.9), [0.5, 0.9], [False, True]),
        (EarlyStopping(target=0.1, mode="min"), [0.5, 0.05], [False, True]),
        (EarlyStopping(patience=2), [float("nan")] * 2, [False, True]),
        (EarlyStopping(patience=1), [float("nan"), 1.0, 1.0], [True, False, True]),
        (EarlyStopping(), [1, 0, 0, 0, 0], [False] * 5),
    ],
)
def test_check_improvement_is_true_to_stop(stop: EarlyStopping, values: list[float], expected: list[bool]) -> None:
    server = alone(Config(early_stopping=stop))
    assert [server.check_improvement(value) for value in values] == expected


def test_save_model_writes_a_checkpoint_and_hands_it_to_wandb(tmp_path: Path) -> None:
    class Run:
        saved: list[str] = []

        def save(self, path: str) -> None:
            self.saved.append(path)

    server = alone(folder=tmp_path)
    path = server.save_model(Run())
    assert path is not None
    assert Run.saved == [str(path)]
    tree = checkpoint.load(path)
    assert set(tree["parameters"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(tree["parameters"]["0.weight"], mlp()[0].weight)
    assert alone().save_model() is None, "without a folder there is nothing to write"


@pytest.mark.parametrize("server_trains", [False, True])
def test_write_results_and_performances(server_trains: bool, tmp_path: Path) -> None:
    def program(e: SimulatedCommunicator) -> Any:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir=str(tmp_path / "run"), server_trains=server_trains)
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(40), 10):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: 0.5)
        e.traffic["broadcast calls"] -= 2  # the word that DONE is written comes after it
        e.traffic["broadcast bytes"] -= 8
        return dict(e.traffic), ps._roles.server and ps._roles.server.performances

    (traffic, performances), *_ = results = World(3).run(program)
    done = json.loads((tmp_path / "run" / "DONE").read_text())
    assert done["validation"] == [0.5, 0.5]
    assert done["rounds"] == 4
    assert done["messages"] == 3 * (traffic["reduce calls"] + traffic["broadcast calls"])
    assert done["bytes"] == 3 * (traffic["reduce bytes"] + traffic["broadcast bytes"])
    if server_trains:
        assert performances == {rank: own for rank, (own, _) in enumerate(results)}


def test_a_round_costs_two_messages_of_the_trained_weights() -> None:
    def program(e: SimulatedCommunicator) -> dict[str, int]:
        model = mlp()
        model[0].requires_grad_(False)  # 429 of 599 parameters travel once only
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        before: dict[str, int] = {}
        for x, y in ps.batches(data(48), 8):
            before = before or dict(e.traffic)  # all have met at the beginning of the loop
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
        return {call: e.traffic[call] - before.get(call, 0) for call in e.traffic}

    for traffic in World(3).run(program):
        assert traffic["reduce calls"] == traffic["broadcast calls"] == 3 + 1  # in the last one all wait for the loop's end
        numel = 176 + 16  # 165 and 5 parameters, each on a 64-byte boundary
        numbers = len(hyper.read(sgd(mlp().parameters())))
        tail = 2 + 3 * (len(COLUMNS) + LIMBS * numbers)  # presence of two tensors; per rank a row, and its hyperparameters
        assert traffic["reduce bytes"] == 4 * 4 * (numel + tail)
        assert traffic["broadcast bytes"] == 4 * (128 + 4 * numel)


def test_a_rank_in_another_round_is_an_error() -> None:
    def program(e: SimulatedCommunicator) -> None:
        if e.rank == 0:
            server = mpips.Server(e, mlp(), sgd)
            server.broadcast_initial_weights()
            server.start_server()
        else:
            worker = mpips.Worker(e, mlp())
            worker.receive_initial_weights()
            worker.control.round = 7.0
            worker.finish()

    with pytest.raises(CommunicatorError, match="rank 1 is in round 7, the server in 0"):
        World(2).run(program)


def poisoned(nonfinite: str, **settings: Any) -> Any:
    """Three workers; worker 2 of 3 has a NaN in round 3 of 5. Returns the weights, the versions and the metrics."""

    def program(e: SimulatedCommunicator) -> Any:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run", nonfinite=nonfinite, **settings)
        for _ in ps.epochs(1):
            for x, y in ps.batches(data(8 * 3 * 5), 8, shuffle=False):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if e.rank == 2 and ps.round == 2:
                    model[2].bias.grad[3] = float("inf")
                ps.step(loss)
        return [p.detach().clone() for p in model.parameters()], ps._control.version

    return World(4).run(program)


def by_hand(take: Any) -> list[torch.Tensor]:
    """Plain SGD on the mean over the workers that `take(round, worker)` admits; no step when it admits none."""
    model = mlp()
    optimizer = sgd(model.parameters())
    x, y = data(8 * 3 * 5)
    for number in range(5):
        taken = [k for k in range(3) if take(number, k)]
        rows = [i for k in taken for i in range(120) if i % 3 == k and i // 3 // 8 == number]
        if not rows:
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_nonfinite_drop_leaves_that_worker_out() -> None:
    for weights, version in poisoned("drop"):
        assert version == 5
        torch.testing.assert_close(weights, by_hand(lambda number, k: (number, k) != (2, 1)))


def test_nonfinite_skip_skips_the_round() -> None:
    for weights, version in poisoned("skip"):
        assert version == 4
        torch.testing.assert_close(weights, by_hand(lambda number, k: number != 2))


def test_nonfinite_raise_changes_nothing_and_names_it() -> None:
    with pytest.raises(RuntimeError, match=r"rank 2 has a NaN or Inf in the gradient of 2\.bias, round 3"):
        poisoned("raise")


def test_clip_is_that_of_the_combined_gradient() -> None:
    def program(e: SimulatedCommunicator) -> list[torch.Tensor]:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run", clip=0.1)
        for x, y in ps.batches(data(24), 8, shuffle=False):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
        return [p.detach().clone() for p in model.parameters()]

    model = mlp()
    F.cross_entropy(model(data(24)[0]), data(24)[1]).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.2, "the test must clip"
    sgd(model.parameters()).step()
    for weights in World(4).run(program):
        torch.testing.assert_close(weights, [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "drop"])
def test_finite_updates_whose_sum_overflows_are_not_taken(nonfinite: str) -> None:
    def program(e: SimulatedCommunicator) -> Any:
        model = nn.Linear(1, 1, bias=False)
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run", nonfinite=nonfinite)
        for (x,) in ps.batches((torch.full((64, 1), 2e37),), 32):
            model(x).mean().backward()
            ps.step(0.0)
        return model.weight.isfinite().all(), ps._control.version

    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="rank 0 has a NaN or Inf in the gradient of weight"):
            World(3).run(program)
    else:
        assert World(3).run(program) == [(True, 0)] * 2
