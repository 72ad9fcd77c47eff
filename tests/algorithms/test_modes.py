"""Rows of modes, and settings that do not go with them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mpips
from mpips.algorithms.modes import MODES, choose_mode, takes_weights
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.config import Config, ConfigError, Local, Outer, Staleness
from mpips.optim.snapshot import SnapshotError
from tests.helpers.programs import data, mlp, train


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("name", MODES)
def test_every_mode_trains_on_several_ranks(name: str) -> None:
    def program(communicator: Communicator) -> tuple[float, float]:
        net = mlp()
        nesterov = {"momentum": 0.9, "nesterov": True} if name == "eamsgd" else {}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, **nesterov)
        ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run", mode=name, local={"steps": 2})
        x, y = data(96)
        y[:] = x[:, :5].argmax(1)  # something that can be learned
        losses = []
        for _ in ps.epochs(12):
            for bx, by in ps.batches((x, y), 8):
                loss = torch.nn.functional.cross_entropy(net(bx), by)
                loss.backward()
                ps.step(loss)
            losses.append(ps.validate(lambda: torch.nn.functional.cross_entropy(net(x), y)))
        return losses[0], losses[-1]

    for first, last in World(3).run(program):
        assert last < first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "asink"}, "mode: given 'asink', allowed: sync, async"),
        ({"mode": "async", "rule": "krum"}, "rule: given 'krum' with mode async, allowed: mean"),
        ({"mode": "async", "deterministic": True}, "deterministic: given True with mode async, allowed: false"),
        ({"mode": "ssp", "server_trains": True}, "server_trains: given True with mode ssp"),
        ({"mode": "fedavg", "backup_workers": 1}, "backup_workers: given 1 with mode fedavg"),
        ({"mode": "sync", "overlap": True, "rule": "median"}, "overlap: given True with mode sync"),
        ({"overlap": True, "backup_workers": 1}, "overlap: given True with mode sync, allowed: false with backup_workers"),
        (
            {"mode": "ssp", "overlap": True, "staleness": Staleness(bound=0)},
            "overlap: given True with mode ssp, allowed: false with backup_workers, and with ssp at staleness.bound 0",
        ),
        ({"mode": "scaffold", "rule": "median"}, "rule: given 'median' with mode scaffold, allowed: mean"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_mode(Config(**settings))
    assert str(error.value).startswith(words)


def test_refused_settings_are_one_line_on_any_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is sent: a rank that went on would wait for the others."""
    for end in World(3).ends:
        with pytest.raises(SystemExit, match="2"):
            mpips.connect(mlp(), sgd, communicator=end, mode="ssp", overlap=True, staleness={"bound": 0})
        assert capsys.readouterr().err == (
            "mpips: overlap: given True with mode ssp, allowed: false with backup_workers, and with ssp at staleness.bound 0\n"
        )


def test_weights_travel_only_where_their_plain_mean_is_taken() -> None:
    def travel(config: Config, workers: int) -> bool:
        return takes_weights(choose_mode(config), config, workers)

    assert travel(Config(mode="local_sgd"), 3)
    assert travel(Config(mode="fedavg"), 3)
    assert not travel(Config(mode="local_sgd", rule="median"), 3)
    assert not travel(Config(mode="local_sgd", outer=Outer(momentum=0.5)), 3)
    assert not travel(Config(mode="diloco", local=Local(steps=3)), 1)
    assert not travel(Config(mode="easgd"), 1)
    assert travel(Config(mode="fedbuff", staleness=Staleness(buffer=1)), 1)
    assert not travel(Config(mode="fedbuff", staleness=Staleness(buffer=1)), 2)


def test_a_rule_with_too_few_workers_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        World(3).run(lambda e: mpips.connect(mlp(), sgd, communicator=e, rule="krum"))
    assert "mpips: rule: krum with robust.num_byzantine=1 needs 5 contributions, 2 came\n" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_rule_with_too_few_clients_a_round_is_refused(size: int) -> None:
    """However many workers there are."""

    def program(communicator: Communicator, clients: int) -> None:
        net = mlp()
        given, settings = mpips.Clients.split(data(60), clients), {"clients": {"fraction": 0.5}}
        train(communicator, net, sgd(net.parameters()), given, 5, mode="fedavg", rule="krum", **settings)

    with pytest.raises(
        ConfigError, match=r"krum with robust\.num_byzantine=1 needs 5 contributions, 4 came, the clients of a round"
    ):
        World(size).run(lambda e: program(e, 8))
    World(size).run(lambda e: program(e, 10))


@pytest.mark.parametrize(("before", "after"), [("sync", "diloco"), ("diloco", "sync"), ("local_sgd", "fedavg")])
def test_a_checkpoint_of_another_mode_is_refused(before: str, after: str) -> None:
    def program(communicator: Communicator, mode: str, **more: Any) -> None:
        net = mlp()
        train(communicator, net, sgd(net.parameters()), data(32), 8, mode=mode, **more)

    World(2).run(lambda e: program(e, before))
    with pytest.raises(SnapshotError, match=f"of mode {before}, this run of {after}; give --mpips.mode {before}"):
        World(2).run(lambda e: program(e, after, resume=str(Path("run").resolve())))


def test_new_workers_of_a_resumed_run_have_the_schedulers_rate() -> None:
    def program(communicator: Communicator, epochs: int, **more: Any) -> float:
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        ps = mpips.connect(net, optimizer, communicator=communicator, **{"run_dir": "run", "mode": "local_sgd", **more})
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(32), 4):
                loss = torch.nn.functional.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
            scheduler.step()
        assert ps._worker.inner is not None
        rate = optimizer.param_groups[0]["lr"]
        assert scheduler.get_last_lr() == [rate]
        assert ps._worker.inner.lr == 2 * rate  # of the last step
        return rate

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns of a scheduler that comes before a step
        assert World(3).run(lambda e: program(e, 2)) == [0.025] * 2
        assert World(5).run(lambda e: program(e, 3, resume="auto")) == [0.0125] * 4
