"""The run as a script sees it, on simulated ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpips
import mpips.model.message
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.programs import data, metrics, mlp


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def loop(
    e: Communicator,
    body: Any = None,
    epochs: int = 3,
    value: Any = lambda: 0.5,
    n: int = 96,
    told: list[float] | None = None,
    **settings: Any,
) -> mpips.Run:
    """The documented loop; `body(ps, batch number)` may return True to break, `told` gets what validate returns."""
    model = mlp()
    ps = mpips.connect(model, sgd, communicator=e, **{"run_dir": "run", **settings})
    for _ in ps.epochs(epochs):
        for number, (x, y) in enumerate(ps.batches(data(n), 8)):
            if body and body(ps, number):
                break
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
        number = ps.validate(value)
        if told is not None:
            told.append(number)
    return ps


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_does_the_same_rounds(size: int) -> None:
    runs = World(size).run(loop)
    workers = max(1, size - 1)
    assert {run.round for run in runs} == {3 * 12 // workers}
    assert [run.worker for run in runs] == list(range(workers))
    assert {run.workers for run in runs} == {workers}


def test_a_break_ends_this_workers_shard_only() -> None:
    runs = World(3).run(lambda e: loop(e, lambda ps, number: ps.worker == 0 and number == 2))
    assert {run.round for run in runs} == {3 * 6}
    assert [row["samples"] for row in metrics(Path("run"))[:6]] == [16, 16, 8, 8, 8, 8]


def test_stop_ends_all_ranks_in_the_same_round() -> None:
    runs = World(4).run(lambda e: loop(e, lambda ps, number: ps.worker == 1 and ps.round == 5 and ps.stop()))
    assert {(run.round, run.stopping) for run in runs} == {(6, "requested")}
    assert json.loads(Path("run", "DONE").read_text())["stop"] == "requested"


@pytest.mark.parametrize("server_trains", [False, True])
def test_early_stopping_is_obeyed_by_all_ranks_in_the_same_round(server_trains: bool) -> None:
    def program(e: Communicator) -> tuple[Any, ...]:
        values = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
        told: list[float] = []
        stop = {"patience": 3}
        run = loop(e, epochs=9, value=lambda: next(values), told=told, server_trains=server_trains, early_stopping=stop)
        return run.round, run.stopping, *told

    results = World(4).run(program)
    rounds = 5 * (3 if server_trains else 4)
    assert results == [(rounds, "patience", 0.1, 0.5, 0.4, 0.5, 0.3)] * (4 if server_trains else 3)


def test_validate_returns_worker_0_s_number_on_every_worker() -> None:
    def program(e: Communicator, **settings: Any) -> float:
        ps = mpips.connect(mlp(), sgd, communicator=e, run_dir="run", **settings)
        return ps.validate(lambda: 40.0 + ps.worker)

    assert World(1).run(program) == [40.0]
    assert World(3).run(program) == [40.0] * 2
    assert World(3).run(lambda e: program(e, server_trains=True)) == [40.0] * 3


def test_without_a_function_the_server_measures_as_connect_said() -> None:
    loaded: list[int] = []

    def program(e: Communicator) -> tuple[float, float]:
        given = {"validation_data": lambda: loaded.append(e.rank) or [7.0], "validate": lambda numbers: numbers[0] + e.rank}
        ps = mpips.connect(mlp(), sgd, communicator=e, run_dir="run", **given)
        return ps.validate(), ps.validate()

    assert World(3).run(program) == [(7.0, 7.0)] * 2
    assert loaded == [0]


def test_several_numbers_are_a_dict_and_the_monitored_one_stops() -> None:
    def program(e: Communicator) -> tuple[Any, ...]:
        ps = mpips.connect(mlp(), sgd, communicator=e, run_dir="run", early_stopping={"patience": 2, "monitor": "f1"})
        told = [ps.validate(lambda: {"loss": 1.0, "f1": 0.5}), ps.validate(lambda: 0.25, "other"), ps.stopping]
        return *told, ps.validate(lambda: {"loss": 1.0, "f1": 0.5}), ps.validate(lambda: {"f1": 0.5}), ps.stopping

    both = {"loss": 1.0, "f1": 0.5}
    assert World(3).run(program) == [(both, 0.25, "", both, {"f1": 0.5}, "patience")] * 2


@pytest.mark.parametrize(
    ("value", "words"), [(None, "None"), ("0.5", "'0.5'"), (torch.ones(2), r"a Tensor of shape \(2,\)"), ({"f1": None}, "'f1'")]
)
@pytest.mark.parametrize("size", [1, 3])
def test_validate_takes_numbers_alone(size: int, value: Any, words: str) -> None:
    def program(e: Communicator) -> None:
        mpips.connect(mlp(), sgd, communicator=e, run_dir="run").validate(lambda: value)

    with pytest.raises(TypeError, match=rf"validate\(\).*{words}.*expected a number"):
        World(size).run(program)


def test_uneven_and_empty_shards_do_not_hang() -> None:
    for n in (0, 1, 2, 9, 17):
        runs = World(4).run(lambda e, n=n: loop(e, epochs=2, n=n))
        assert {run.round for run in runs} == {2 * math.ceil(math.ceil(n / 3) / 8)}
        assert sum(row["samples"] for row in metrics(Path("run"))) == 2 * n


def test_metrics_are_samples_weighted_means_over_the_ranks() -> None:
    def program(e: Communicator) -> None:
        model = nn.Linear(1, 1, bias=False)
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run", metrics=["place"])
        own = torch.zeros(2 * e.rank, 1)  # workers 1, 2, 3 have 2, 4, 6 samples
        for x in ps.batches([own] if e.rank else [], shard=False):
            loss = model(x).sum() + 10.0 * e.rank
            loss.backward()
            ps.step(loss, samples=len(x), place=float(e.rank))

    World(4).run(program)
    first = metrics(Path("run"))[0]
    assert first["samples"] == 12
    assert first["loss"] == pytest.approx((2 * 10 + 4 * 20 + 6 * 30) / 12)
    assert first["place"] == pytest.approx((2 * 1 + 4 * 2 + 6 * 3) / 12)


def test_metrics_of_every_rank_come_without_a_further_message() -> None:
    def program(e: Communicator) -> dict[str, int]:
        before = dict(e.traffic)
        loop(e, epochs=1, metrics=())
        return {call: count - before.get(call, 0) for call, count in e.traffic.items() if call.endswith("calls")}

    first = World(3).run(program)[0]
    events = [json.loads(line) for line in Path("run", "events.jsonl").read_text().splitlines()]
    table = next(event["ranks"] for event in events if event["event"] == "round")
    assert [entry["rank"] for entry in table] == [0, 1, 2]
    assert first["reduce calls"] == 6 + 5, "one Reduce a round, one for each call of all workers"


def test_gradient_accumulation_is_the_larger_batch() -> None:
    def program(e: Communicator, together: int) -> list[torch.Tensor]:
        model = mlp().double()
        ps = mpips.connect(model, sgd, communicator=e, run_dir=f"run{together}")
        given = data(96, torch.float64)
        for _ in ps.epochs(2):
            for number, (x, y) in enumerate(ps.batches(given, 16 // together, shuffle=False), 1):
                loss = F.cross_entropy(model(x), y)
                (loss / together).backward()
                if number % together == 0:
                    ps.step(loss)
        return [p.detach().clone() for p in model.parameters()]

    for one, four in zip(World(1).run(lambda e: program(e, 1)), World(1).run(lambda e: program(e, 4)), strict=True):
        torch.testing.assert_close(one, four)


def test_step_says_what_is_wrong_with_its_arguments() -> None:
    ps = mpips.connect(mlp(), sgd, communicator=World(1).ends[0], run_dir="run", metrics=["accuracy"])
    for _ in ps.batches(data(8), 4):
        with pytest.raises(ValueError, match=r"given the metrics \['acc'\].*names \('accuracy',\)"):
            ps.step(1.0, 4, acc=0.5)
        with pytest.raises(ValueError, match="samples=-1; expected 0 or more"):
            ps.step(1.0, -1, accuracy=0.5)


def test_settings_that_are_not_allowed_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for settings, line in [
        ({"buffers": "maen"}, "mpips: buffers: given 'maen', allowed: mean, server, local\n"),
        (
            {"rule": "krumm"},
            "mpips: rule: given 'krumm', allowed: mean, median, trimmed, krum, multikrum, bulyan, rfa, cclip, normclip, sign, "
            "or a class by its name, package.module:Class\n",
        ),
        ({"checkpoint": {"evry": 3}}, "mpips: checkpoint.evry: no such setting; did you mean checkpoint.every?\n"),
        ({"clip": "much"}, "mpips: clip: given 'much', allowed: a number or null\n"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            mpips.connect(mlp(), sgd, **settings)
        assert capsys.readouterr().err == line


def test_the_run_folder_has_what_is_promised(tmp_path: Path) -> None:
    World(3).run(loop)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "env.json", "events.jsonl", "metrics.csv", "validations.csv", "logs", "checkpoints", "DONE", ".lock",
    }  # fmt: skip
    assert [path.name for path in sorted((folder / "logs").iterdir())] == [f"rank_000{rank}.log" for rank in range(3)]
    events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "done"
    assert {"start", "round", "validate", "checkpoint"} <= set(events)
    assert len(metrics(folder)) == 18


def test_the_saved_configuration_gives_the_same_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    World(2).run(lambda e: loop(e, clip=0.5, seed=3, early_stopping={"patience": 7}))
    monkeypatch.setenv("MPIPS_CONFIG", str(tmp_path / "run" / "config.yaml"))
    monkeypatch.setenv("MPIPS_RUN_DIR", "again")
    World(2).run(loop)
    saved, again = ((tmp_path / name / "config.yaml").read_text().split("\n", 1)[1] for name in ("run", "again"))  # but the id
    assert again == saved.replace("run_dir: run", "run_dir: again")
    assert (tmp_path / "again" / "metrics.csv").read_text() == (tmp_path / "run" / "metrics.csv").read_text()


@pytest.mark.parametrize("size", [1, 3])
def test_a_scheduler_is_the_scripts_and_its_rate_the_servers(size: int) -> None:
    def rates(each: str) -> list[float]:
        def program(e: Communicator) -> None:
            model = mlp()
            optimizer = sgd(model.parameters())
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
            for _ in ps.epochs(2):
                for x, y in ps.batches(data(16 * ps.workers), 8):
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    ps.step(loss)
                    scheduler.step() if each == "round" else None
                scheduler.step() if each == "epoch" else None

        World(size).run(program)
        return [row["lr"] for row in metrics(Path("run"))]

    assert rates("epoch") == [0.1, 0.1, 0.05, 0.05]
    assert rates("round") == [0.1, 0.05, 0.025, 0.0125]


def test_two_loops_in_an_epoch_and_a_loop_of_ones_own_over_epochs() -> None:
    orders: list[list[int]] = []

    def program(e: Communicator) -> None:
        net = nn.Linear(1, 1)
        ps = mpips.connect(net, sgd, communicator=e, run_dir="run")
        for _ in range(3):
            seen = []
            for (x,) in ps.batches((torch.arange(10.0).view(-1, 1),), 2):
                seen += x.view(-1).int().tolist()
                loss = net(x).sum()
                loss.backward()
                ps.step(loss)
            orders.append(seen)

    World(1).run(program)
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("size", [1, 3])
def test_all_workers_may_validate_and_save_inside_a_loop(size: int) -> None:
    def program(e: Communicator) -> list[float]:
        told = []

        def body(ps: mpips.Run, number: int) -> None:
            if number == 2:
                told.append(ps.validate(lambda: float(ps.round)))
                ps.save()

        loop(e, body, told=told)
        return told

    rounds = 12 // max(1, size - 1)
    expected = [number for epoch in range(3) for number in (rounds * epoch + 2.0, 0.5)]
    assert World(size).run(program) == [expected] * max(1, size - 1)
    assert len(metrics(Path("run"))) == 3 * rounds, "the others do not step meanwhile"


@pytest.mark.parametrize("call", ["validate", "save"])
def test_a_call_that_one_worker_alone_makes_is_an_error_on_all_and_not_a_hang(call: str) -> None:
    said = []

    def program(e: Communicator) -> None:
        def body(ps: mpips.Run, number: int) -> None:
            if ps.worker == 1 and number == 2:
                ps.validate(lambda: 1.0) if call == "validate" else ps.save()

        try:
            loop(e, body)
        except mpips.model.message.CallError as error:
            said.append(str(error))
            raise

    words = rf"do not make the same calls: worker 0 \(rank 1\) .*; worker 1 \(rank 2\) at ps\.{call}\(\)"
    with pytest.raises(mpips.model.message.CallError, match=words):
        World(3).run(program)
    assert len(said) == 3
    assert len(set(said)) == 1


def test_a_worker_that_has_ended_validates_no_more() -> None:
    def program(e: Communicator) -> None:
        ps = mpips.connect(mlp(), sgd, communicator=e, run_dir="run")
        if ps.worker == 1:
            ps.validate(lambda: 1.0)

    words = r"worker 0 \(rank 1\) at the end of its script; worker 1 \(rank 2\) at ps\.validate\(\)"
    with pytest.raises(mpips.model.message.CallError, match=words):
        World(3).run(program)


@pytest.mark.parametrize("call", ["validate", "save"])
def test_where_requests_are_answered_calls_inside_a_loop_are_refused(call: str) -> None:
    def body(ps: mpips.Run, number: int) -> None:
        ps.validate(lambda: 1.0) if call == "validate" else ps.save()

    with pytest.raises(RuntimeError, match=rf"{call}\(\) inside a loop in mode async"):
        World(3).run(lambda e: loop(e, body, mode="async"))


def test_streamed_batches_count_their_samples() -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for batch in ps.batches({"x": x, "y": y} for x, y in zip(*(t.split(8) for t in data(44)), strict=True)):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            loss.backward()
            ps.step(loss)

    World(3).run(program)
    assert [row["samples"] for row in metrics(Path("run"))] == [16, 16, 12]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
    ],
)
def test_parameters_changed_after_connect_are_an_error_and_not_silence(change: Any) -> None:
    model = mlp()
    ps = mpips.connect(model, sgd, communicator=World(1).ends[0], run_dir="run")
    change(model)
    for _ in ps.batches(data(8), 4):
        with pytest.raises(ValueError, match=r"0\.weight.*connect"):
            ps.step(1.0, 1)


def test_neighbouring_seeds_do_not_share_orders() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        net = nn.Linear(1, 1)
        ps = mpips.connect(net, sgd, communicator=World(1).ends[0], run_dir="run", seed=seed)
        seen = []
        for _ in ps.epochs(3):
            seen.append(tuple(int(x) for (x,) in ps.batches((torch.arange(20.0),), 1)))
        return seen

    assert len({*orders(0), *orders(1), *orders(2)}) == 9


SIZES = pytest.mark.parametrize("size", [1, 3])


@SIZES
def test_breaking_out_because_the_run_stops_is_fine(size: int) -> None:
    def program(e: Communicator) -> tuple[int, str]:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for _ in ps.epochs(3):
            for x, y in ps.batches(data(96), 8):
                if ps.round == 3:
                    ps.stop()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
                if ps.stopping:
                    break
            ps.validate(lambda: 0.5)
        return ps.round, ps.stopping

    assert World(size).run(program) == [(4, "requested")] * max(1, size - 1)


@SIZES
@pytest.mark.parametrize("inside", [False, True], ids=["between loops", "inside the measure"])
def test_stop_outside_a_loop_ends_all_ranks(size: int, inside: bool) -> None:
    def program(e: Communicator) -> tuple[int, str]:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for epoch in ps.epochs(9):
            for x, y in ps.batches(data(48), 8):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
            if inside:
                ps.validate(lambda epoch=epoch: ps.stop() or 0.5 if epoch == 1 else 0.5)
            elif epoch == 1:
                ps.stop()
        return ps.round, ps.stopping

    workers = max(1, size - 1)
    assert World(size).run(program) == [(2 * 6 // workers, "requested")] * workers
    assert json.loads(Path("run", "DONE").read_text())["stop"] == "requested"


@SIZES
def test_several_steps_on_one_batch(size: int) -> None:
    def program(e: Communicator) -> int:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(96), 8):
                for _ in range(3):
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    ps.step(loss, samples=8)
        return int(ps._control.version)

    assert set(World(size).run(program)) == {2 * 3 * 12 // max(1, size - 1)}


def test_a_loop_inside_another_is_refused() -> None:
    ps = mpips.connect(mlp(), sgd, communicator=World(1).ends[0], run_dir="run")
    with pytest.raises(RuntimeError, match="inside another"):
        list(zip(ps.batches(data(8), 4), ps.batches(data(8), 4), strict=True))


def leaving(e: Communicator, leavers: set[int], where: str) -> mpips.Run:
    """The loop in a function that the leavers return from; then the world does what Python's end does."""
    model = mlp()
    ps = mpips.connect(model, sgd, communicator=e, run_dir="run")

    def work() -> None:
        for _ in ps.epochs(3):
            for x, y in ps.batches(data(48), 8):
                if ps.round == 4 and e.rank in leavers:
                    return
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                ps.step(loss)
            ps.validate(lambda: 0.5)
            if where == "saves":
                ps.save()

    work()
    return ps


@pytest.mark.parametrize("where", ["plain", "saves"])
@pytest.mark.parametrize(("size", "leavers", "why"), [(1, {0}, "ended"), (3, {1, 2}, "ended"), (3, {1}, "left")])
def test_returning_from_the_loop_loses_nothing(size: int, leavers: set[int], why: str, where: str) -> None:
    from mpips import checkpoint

    runs = World(size).run(lambda e: leaving(e, leavers, where))
    assert {run.stopping for run in runs} == {why}
    newest = checkpoint.newest(Path("run", "checkpoints"))
    assert newest is not None
    assert checkpoint.load(newest)["round"] == runs[0].round == (5 if why == "left" else 4)  # whoever stays has stepped
    assert Path("run", "DONE").exists() == (why == "ended")


def test_preemption_while_a_rank_leaves() -> None:
    def program(e: Communicator) -> None:
        model = mlp()
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for x, y in ps.batches(data(48), 8):
            if ps.round == 2 and e.rank == 2:
                break
            if ps.round == 2:
                ps.preempt()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)

    with pytest.raises(SystemExit, match="75"):
        World(3).run(program)
    assert Path("run", "checkpoints", "round_00000003.h5").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_batchnorm_sees_every_forward_pass_of_one_worker(size: int) -> None:
    """5 batches an epoch, a step every 2: the fifth is forwarded, but not stepped before the loop ends."""

    def batches() -> Any:
        return zip(*(t.split(8) for t in data(40)), strict=True)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    optimizer = sgd(plain.parameters())
    for _ in range(2):
        for number, (x, y) in enumerate(batches(), 1):
            F.cross_entropy(plain(x), y).backward()
            if number % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()

    def program(e: Communicator) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
        ps = mpips.connect(model, sgd, communicator=e, run_dir="run")
        for _ in ps.epochs(2):
            for number, (x, y) in enumerate(ps.batches(data(40), 8, shuffle=False), 1):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if number % 2 == 0:
                    ps.step(loss)
        return model.state_dict()

    worker = World(size).run(program)[-1]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, worker[name]), name


def test_unfreezing_after_connect_is_an_error_and_not_silence() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    ps = mpips.connect(model, sgd, communicator=World(1).ends[0], run_dir="run")
    with pytest.raises(ValueError, match=r"0\.weight was unfrozen"):
        for x, y in ps.batches(data(16), 8):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            ps.step(loss)
            model[0].requires_grad_(True)
    assert ps.round == 1


@pytest.mark.parametrize(
    ("rank", "size", "trains", "expected"),
    [("0", "4", "", (-1, 3)), ("2", "4", "", (1, 3)), ("2", "4", "true", (2, 4)), ("0", "1", "", (0, 1))],
)
def test_the_worker_s_number_is_there_before_connect(
    rank: str, size: str, trains: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", size)
    if trains:
        monkeypatch.setenv("MPIPS_SERVER_TRAINS", trains)
    assert (mpips.worker_index(), mpips.workers()) == expected
