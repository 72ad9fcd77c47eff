"""Every file in examples/ is short, runs on one rank and on several, and learns."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MNIST = Path(os.environ.get("MPIPS_TEST_MNIST", ROOT.parent / "shared" / "data" / "mnist.h5"))
Start = Callable[..., "subprocess.CompletedProcess[str]"]

CASES = {  # example and the flags of a short run
    "charlm": ("charlm.py", "--epochs", "1", "--rounds", "20", "--accumulate", "2", "--batch-size", "4"),
    "custom_loop": ("custom_loop.py", "--rounds", "10"),
    "fedavg": ("fedavg.py", "small.h5", "--rounds", "12", "--clients", "6", "--clients.fraction", "0.5"),
    "finetune": ("finetune.py", "--epochs", "2"),
    "digits": ("digits.py", "--epochs", "2"),
    "mnist 2nn": ("mnist.py", "small.h5", "--epochs", "2", "--batch-size", "16"),
    "mnist cnn": ("mnist.py", "small.h5", "--epochs", "1", "--batch-size", "16", "--model", "cnn"),
}


def small_mnist(path: Path) -> None:
    """Ten blurred squares in place of ten digits, laid out as the real file."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for part, count in (("train", 600), ("test", 100)):
            labels = random.integers(0, 10, count, dtype=np.uint8)
            images = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
            for image, label in zip(images, labels, strict=True):
                row, column = 2 + 13 * (label // 5), 5 * (label % 5)
                image[row : row + 10, column : column + 5] += 180
            file[f"{part}/images"], file[f"{part}/labels"] = images, labels


def losses(folder: Path) -> list[float]:
    """The loss of every round in which somebody trained."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if float(row["samples"])]


def check(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """The run has ended well, and its loss has fallen by a tenth at least."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "DONE").exists(), done.stdout + done.stderr
    curve = losses(folder)
    assert len(curve) >= 10
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])


def accuracy(folder: Path) -> float:
    """The last validation's value."""
    return float(json.loads((folder / "DONE").read_text())["value"])


def test_every_example_is_tested() -> None:
    assert sorted({case[0] for case in CASES.values()}) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_is_under_80_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 80


@pytest.mark.parametrize("case", CASES)
def test_in_one_process(case: str, solo: Start, tmp_path: Path) -> None:
    small_mnist(tmp_path / "small.h5")
    script, *flags = CASES[case]
    check(solo(EXAMPLES / script, *flags, "--run_dir", "out"), tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_on_three_ranks(case: str, mpirun: Start, tmp_path: Path) -> None:
    small_mnist(tmp_path / "small.h5")
    script, *flags = CASES[case]
    check(mpirun(3, EXAMPLES / script, *flags, "--run_dir", "out"), tmp_path / "out")


def test_the_custom_loop_averages_weights_on_ranks_that_all_train(mpirun: Start, tmp_path: Path) -> None:
    script, *flags = CASES["custom_loop"]
    check(mpirun(3, EXAMPLES / script, *flags, "--server_trains", "--run_dir", "out"), tmp_path / "out")


@pytest.mark.timeout(180)
@pytest.mark.skipif(not MNIST.exists(), reason=f"no {MNIST}; MPIPS_TEST_MNIST names the file")
def test_mnist_2nn_reaches_97_5_percent_with_four_workers(mpirun: Start, tmp_path: Path) -> None:
    done = mpirun(5, EXAMPLES / "mnist.py", MNIST, "--model", "2nn", "--run_dir", "out", timeout=120)
    check(done, tmp_path / "out")
    assert accuracy(tmp_path / "out") >= 0.975
