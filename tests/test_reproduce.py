"""What examples/reproduce measures, in small: the scripts run, and say what they should of cases that leave no doubt."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_examples import EXAMPLES, small_mnist

REPRODUCE = EXAMPLES / "reproduce"
Start = Callable[..., "subprocess.CompletedProcess[str]"]


def test_krum_withstands_what_breaks_the_mean(solo: Start, tmp_path: Path) -> None:
    small_mnist(tmp_path / "small.h5")
    flags = ["--rules", "mean", "krum", "--attacks", "none", "x1000", "nan-late", "--epochs", "6"]
    done = solo(REPRODUCE / "robust.py", "small.h5", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {line.split()[0]: line.split()[1:4] for line in done.stdout.splitlines()[2:]}
    assert [value.endswith("!") for value in table["mean"]] == [False, True, True], done.stdout
    assert float(table["krum"][0]) > 80
    assert not any(value.endswith("!") for value in table["krum"]), done.stdout


def test_stragglers_are_compared_and_drawn(mpirun: Start, tmp_path: Path) -> None:
    flags = ["--modes", "sync", "async", "--rates", "0.4", "--seeds", "1", "--seconds", "8", "--target", "0.6", "--out", "out"]
    done = mpirun(3, REPRODUCE / "straggler.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "straggler-one.json").read_text())
    (sync,), (free,) = found["sync"], found["async"]
    assert max(map(int, free["staleness"])) >= 1  # the straggler's
    assert not sync.get("staleness")
    assert (tmp_path / "out" / "straggler-one.png").stat().st_size > 1000


@pytest.mark.parametrize("bound", [0, 2])
def test_no_worker_is_ever_farther_ahead_than_the_bound(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPRODUCE))
    speed, lead = importlib.import_module("ssp_bound").run(bound, "one", steps=100)
    assert lead == bound
    assert speed == pytest.approx(80, rel=0.05)  # 4 steps in 50 ms: all end up at the pace of the slowest


def test_momentum_at_the_workers_is_that_of_the_server_under_the_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(REPRODUCE))
    robust = importlib.import_module("robust")
    small_mnist(tmp_path / "small.h5")
    data, test = (robust.load(str(tmp_path / "small.h5"), part) for part in ("train", "test"))
    both = [robust.train("mean", "none", at_workers, 3, 0, data, test) for at_workers in (True, False)]
    assert both[0] == pytest.approx(both[1], abs=0.01)
    monkeypatch.setattr(robust, "MOMENTUM", 0.0)
    assert robust.train("mean", "none", True, 3, 0, data, test) != pytest.approx(both[1], abs=0.01)
