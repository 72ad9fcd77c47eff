"""`mpips bench` at tiny sizes: what it prints, that the figures fit each other, that wrong weights are found out. No timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mpips.cli import main as cli
from mpips.cli.bench import picture
from mpips.cli.bench.agreement import difference
from mpips.cli.bench.case import BOUNDS, case, variants
from mpips.cli.bench.error import BenchError
from mpips.cli.bench.gradient import WIDTH, Gradient, Loss, initial, numel, parts_of
from mpips.cli.bench.limit import Line
from mpips.cli.bench.opponents import opponents
from tests.test_examples import small_mnist

pytestmark = pytest.mark.skipif(
    any(int(os.environ.get(name, 1)) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")),
    reason="a launcher started by every rank of another launcher",
)

Start = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ["--repeats", "7"]
FACTS = {"cores", "hosts", "load", "torch", "threads", "settings", "repeats"}


@pytest.fixture
def bench(solo: Start) -> Start:
    """`mpips bench ...` as from a shell."""
    return lambda *words, **keywords: solo("-m", "mpips.cli.main", "bench", *words, timeout=150, **keywords)


def cases(done: subprocess.CompletedProcess[str]) -> list[dict[str, float]]:
    """What is on stdout, which is JSON and nothing else; each case's figures fit each other."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    for each in found:
        assert set(each) >= FACTS
        consistent(each)
    return found


def consistent(of: dict[str, float]) -> None:
    names = variants(of)
    assert names[0] == "mpips"
    for name in names:
        assert 0 < of[f"{name}_min_ms"] <= of[f"{name}_ms"] <= of[f"{name}_max_ms"]
    for name in names[1:]:
        ratio = of["mpips_ms"] / of[f"{name}_ms"]
        if name in BOUNDS:
            assert of[f"mpips_to_{name}"] == pytest.approx(ratio)
        else:
            assert of[f"{name}_to_mpips"] == pytest.approx(1 / ratio)


def test_round_prints_json_alone_and_leaves_three_files(bench: Start, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    words = ["round", "-n", "2", "--mb", "0.25,1", *SHORT, "--json", "--out", "figures"]
    done = bench(*words, environment={"TMPDIR": str(tmp_path / "t")})
    found = cases(done)
    assert [(each["n"], each["mb"]) for each in found] == [(2, 0.25), (2, 1)]
    for each in found:
        assert variants(each) == ["mpips", "limit", "raw_mpi", "ddp_gloo"]
        assert {"n", "mb", "mpips_ms", "limit_ms", "raw_mpi_ms", "ddp_gloo_ms", "mpi", "step"} <= set(each)
        assert each["difference"] <= each["allowed"]
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == ["round.json", "round.png", "round.txt"]
    assert json.loads((tmp_path / "figures" / "round.json").read_text()) == found
    text = (tmp_path / "figures" / "round.txt").read_text()
    assert text.endswith("repeat with: mpips bench round -n 2 --mb 0.25,1 --repeats 7 --step fused\n")
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "t").glob("mpips-*"))


def test_small_gives_rounds_a_second(bench: Start) -> None:
    (found,) = cases(bench("small", "-n", "2", "--kb", "4", "--rounds", "3", *SHORT, "--json"))
    assert found["mb"] == 4 / 1024
    for name in variants(found):
        assert found[f"{name}_rounds_per_s"] == pytest.approx(1e3 / found[f"{name}_ms"])


@pytest.mark.parametrize("data", [[], ["--data", "small.h5"]])
def test_train_gives_samples_a_second_and_efficiency(bench: Start, tmp_path: Path, data: list[str]) -> None:
    small_mnist(tmp_path / "small.h5")
    (found,) = cases(bench("train", "-n", "2", "--steps", "3", "--batch-size", "8", *data, *SHORT, "--json"))
    assert variants(found) == ["mpips", "plain", "plain_threads", "ddp_gloo"]
    assert found["mpips_samples_per_s"] == pytest.approx(1e3 * 16 / found["mpips_ms"])
    assert found["efficiency"] == pytest.approx(found["plain_to_mpips"] / found["together"])


def test_checkpoint_compares_what_is_durable(bench: Start, tmp_path: Path) -> None:
    (found,) = cases(bench("checkpoint", "--mb", "1", "--folder", str(tmp_path), *SHORT, "--json"))
    assert variants(found) == ["mpips", "memcpy", "raw_write", "torch_save"]
    assert 1 << 20 < found["file_bytes"] < 1.1 * (1 << 20)
    assert found["held_to_memcpy"] == pytest.approx(found["held_ms"] / found["memcpy_ms"])
    assert found["raw_write_to_behind"] == pytest.approx(found["raw_write_ms"] / found["behind_ms"])
    assert list(tmp_path.iterdir()) == []


def test_scaling_is_one_table_of_several_launches(bench: Start) -> None:
    done = bench("scaling", "-n", "2,3", "--mb", "0.25", *SHORT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1] if " mpips " in line and "0.25" in line] == ["2", "3"]
    assert lines[-1] == "repeat with: mpips bench scaling -n 2,3 --mb 0.25 --repeats 7 --step fused"


def test_under_mpirun_rank_0_alone_speaks(mpirun: Start) -> None:
    found = cases(mpirun(2, "-m", "mpips.cli.main", "bench", "round", "--mb", "0.1", *SHORT, "--json"))
    assert [each["n"] for each in found] == [2]


def test_one_process_is_asked_for_where_there_is_no_job_for_mpirun(mpirun: Start) -> None:
    done = mpirun(2, "-m", "mpips.cli.main", "bench", "checkpoint", "--mb", "1")
    assert done.returncode == 2
    assert "expected one process" in done.stderr


RIGHT = """
    from mpi4py import MPI

    def make_round(comm, weights, optimizer):
        def run():
            comm.Allreduce(MPI.IN_PLACE, weights.grad.numpy())
            weights.grad.div_(comm.size)
            optimizer.step()
        return run
"""
WRONG = RIGHT.replace("weights.grad.div_(comm.size)", "")


def opponent(path: Path, source: str) -> Path:
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_wrong_weights_are_found_out(mpirun: Start, tmp_path: Path, flags: list[str]) -> None:
    against = [opponent(tmp_path / "wrong.py", WRONG), opponent(tmp_path / "right.py", RIGHT)]
    done = mpirun(2, "-m", "mpips.cli.bench", "round", "--mb", "0.1", *SHORT, "--against", *against, *flags)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if "other weights than mpips has: wrong by " in line]
    assert len(said) == 1, done.stderr
    assert "right" not in said[0]
    assert said[0].endswith("allowed 1e-05; no times given")
    if flags:
        assert json.loads(done.stdout)["exit"] == 1
    else:
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["KIND"]),
        (["fly"], ["KIND", "'fly'", "'round', 'small', 'train', 'checkpoint', 'scaling'"]),
        (["round", "-n", "1"], ["-n", "'1'", "at least 2"]),
        (["round", "-n", "2,4"], ["-n", "'2,4'", "at least 2"]),
        (["round", "--mb", "1,0"], ["--mb", "'0'", "above 0"]),
        (["round", "--mb", "big"], ["--mb", "'big'", "above 0"]),
        (["round", "--repeats", "3"], ["--repeats", "'3'", "at least 7"]),
        (["round", "--step", "slow"], ["--step", "'slow'"]),
        (["scaling", "-n", "2,1"], ["-n", "'1'", "at least 2"]),
        (["train", "--data", "missing.h5"], ["--data", "'missing.h5'", "exists"]),
        (["checkpoint", "--folder", "nowhere"], ["--folder", "'nowhere'", "exists"]),
        (["round", "--against", "missing.py"], ["--against", "'missing.py'", "Python file", "exists"]),
        (["small", "--mb", "1"], ["'--mb'", "--help"]),
    ],
)
def test_bad_usage_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *words])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mpips")
    for word in said:
        assert word in err


# Opponents


def test_whom_it_is_compared_with_may_be_said(bench: Start, tmp_path: Path) -> None:
    mine = opponent(tmp_path / "mine.py", RIGHT)
    done = bench("round", "-n", "2", "--mb", "0.1", *SHORT, "--against", mine, "--out", ".", "--json")
    (found,) = cases(done)
    assert variants(found) == ["mpips", "limit", "mine"]
    assert found["difference"] <= found["allowed"]
    assert (tmp_path / "round.txt").read_text().endswith(f"--step fused --against {mine}\n")


def test_it_may_be_compared_with_nobody(bench: Start) -> None:
    done = bench("round", "-n", "2", "--mb", "0.1", *SHORT, "--against")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "mpips " in line and "0.1" in line]
    assert "raw_mpi" not in done.stdout
    assert "same weights" not in done.stdout


def test_an_installed_package_has_no_opponents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(opponents(None, "make_round")) == ["raw_mpi", "ddp_gloo"]
    assert list(opponents(None, "wrap")) == ["ddp_gloo"]
    assert list(opponents(None, "save")) == ["torch_save"]
    monkeypatch.setattr("mpips.cli.bench.opponents.FOLDER", tmp_path)
    assert opponents(None, "make_round") == {}


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("plain.py", RIGHT, "expected a file of another name: plain is taken"),
        ("empty.py", "", "expected a file that defines make_round"),
        (
            "torn.py",
            "import nowhere",
            "cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("text.txt", "", "expected a Python file"),
    ],
)
def test_a_file_that_is_no_opponent_is_refused(tmp_path: Path, name: str, source: str, said: str) -> None:
    with pytest.raises(BenchError) as refused:
        opponents([opponent(tmp_path / name, source)], "make_round")
    assert refused.value.status == 2
    assert name in str(refused.value)
    assert said in str(refused.value)


def test_two_opponents_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(BenchError, match="mine is taken"):
        opponents([opponent(tmp_path / "mine.py", RIGHT), opponent(tmp_path / "other" / "mine.py", RIGHT)], "make_round")


# The parts


def test_a_case_has_medians_and_ratios() -> None:
    found = case({"n": 4}, {"mpips": [0.4, 0.2, 0.9], "limit": [0.1, 0.3, 0.2], "raw_mpi": [0.8, 0.6, 0.7]}, rounds=10)
    assert (found["mpips_ms"], found["mpips_min_ms"], found["mpips_max_ms"]) == pytest.approx((40, 20, 90))
    assert (found["mpips_to_limit"], found["raw_mpi_to_mpips"]) == pytest.approx((2, 1.75))


def filled(rank: int, rounds: int, count: int = 4 * WIDTH) -> torch.Tensor:
    flat = torch.zeros(count)
    lengths = parts_of(count, 3)
    gradient = Gradient(rank, lengths)
    for _ in range(rounds):
        gradient.write(torch.split(flat, lengths))
    return flat


def test_each_rank_round_and_place_has_a_gradient_of_its_own() -> None:
    ones = [filled(rank, rounds) for rank in (0, 1, 2) for rounds in (1, 2)]
    assert len({tuple(each.tolist()) for each in ones}) == len(ones)
    rows = [tuple(row.tolist()) for row in ones[0].view(4, WIDTH)]
    assert len(set(rows)) == 4
    assert torch.equal(filled(1, 2), filled(1, 2))


def test_backward_gives_the_same_gradient() -> None:
    lengths = parts_of(4 * WIDTH, 3)
    parts = [torch.nn.Parameter(torch.ones(length)) for length in lengths]
    Loss.apply(Gradient(1, lengths), *parts).backward()
    assert torch.equal(torch.cat([p.grad for p in parts if p.grad is not None]), filled(1, 1))


@pytest.mark.parametrize(("nbytes", "expected"), [(1, WIDTH), (4096, WIDTH), (1 << 20, 1 << 18)])
def test_parts_make_up_the_model(nbytes: int, expected: int) -> None:
    assert numel(nbytes) == expected == sum(parts_of(expected)) == initial(expected).numel()
    assert len(parts_of(1 << 18)) == 4


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e-3])
def test_a_difference_is_seen_wherever_it_is(wrong: float) -> None:
    ours = [torch.ones(3), torch.ones(5)]
    theirs = [part.clone() for part in ours]
    assert difference(ours, theirs) == 0
    theirs[1][4] = wrong
    assert difference(ours, theirs) > 1e-5


def test_the_line_rate_is_scaled_to_what_each_host_must_send() -> None:
    from mpi4py import MPI

    assert Line(MPI.COMM_SELF, [0, 4, 8, 12], 1 << 26).scale == 1.5
    assert Line(MPI.COMM_SELF, [0, 4], 1 << 20).scale == 1 / 16


def test_without_matplotlib_there_is_no_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert picture.draw("round", [], tmp_path / "x.png") is False
