"""Going on without workers that die (`min_workers`): exactly, with whatever they have contributed, and nothing half of it."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn

from mpips.data.clients import hosts
from mpips.model.message import CallError, WorkersLostError
from mpips.run.connect import _meet_again
from tests.conftest import ROOT, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are killed by id")

ROWS, BATCH, EPOCHS = 96, 4, 3
MODEL = f"""
import os, signal, sys, time
import torch
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, y = torch.randn({ROWS}, 5), torch.randn({ROWS}, 3)
model = torch.nn.Sequential(torch.nn.Linear(5, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
"""
TRAIN = """
import mpips
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
if rank == 0:
    open("served", "w").write(str(os.getpid()))
ps = mpips.connect(model, optimizer, run_dir="run", checkpoint={"epochs": 0})
seen = torch.nn.Linear(1, 1, bias=False)
ps.keep(seen=seen)
for epoch in ps.epochs(3):
    for a, b in ps.batches((x, y), 4, shuffle=False):
        optimizer.zero_grad()
        loss = ((model(a) - b) ** 2).mean()
        loss.backward()
        WHAT
        ps.step(loss)
    with torch.no_grad():
        seen.weight.fill_(epoch)
    ps.validate(lambda: float(((model(x) - y) ** 2).mean()))
    ps.print(f"epoch {epoch}, {ps.workers} workers")
AFTER
"""
KILL = "if rank == {rank} and ps.round == {at}: os.kill(os.getpid(), signal.SIGKILL)"

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def survive(tmp_path: Path) -> Start:
    """Start the script by `mpips run --ft`, with a line in its loop, and one behind it."""

    def start(
        what: str, after: str = "", *, n: int = 4, flags: tuple[str, ...] = ("--ft",), script: str = TRAIN, **settings: Any
    ) -> Any:
        (tmp_path / "train.py").write_text(MODEL + script.replace("WHAT", what).replace("AFTER", after))
        words = [word for name, value in ({"min_workers": 1} | settings).items() for word in ("--set", f"{name}={value}")]
        command = [sys.executable, "-m", "mpips.cli.main", "run", "-n", str(n), "--timeout", "80", *flags, *words, "train.py"]
        return run(command, tmp_path, timeout=90)

    return start


def metrics(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "run" / "metrics.csv").open()))


def saved(folder: Path) -> dict[str, Tensor]:
    """The model in the newest checkpoint."""
    with h5py.File(max((folder / "run" / "checkpoints").glob("*.h5"))) as file:
        return {n: torch.as_tensor(v[()]) for kind in ("parameters", "buffers") for n, v in file[kind].items()}


def one_process(workers: Callable[[int, int], list[int]], dealt: Callable[[int], list[int]]) -> nn.Module:
    """The model after the steps of those who contributed: `workers(epoch, step)`, of `dealt(epoch)`, who share the data.

    Each worker's batch goes through BatchNorm alone, and the statistics are averaged, as in a run.
    """
    found: dict[str, Any] = {}
    exec(MODEL, found)
    model, optimizer, x, y = (found[name] for name in ("model", "optimizer", "x", "y"))
    for epoch in range(EPOCHS):
        share = dealt(epoch)
        size = BATCH * len(share)
        for step, first in enumerate(range(0, ROWS, size)):
            optimizer.zero_grad()
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            sums = {name: torch.zeros_like(buffer) for name, buffer in before.items()}
            here = [
                torch.arange(first, min(first + size, ROWS))[share.index(worker) :: len(share)]
                for worker in workers(epoch, step)
            ]
            total = sum(map(len, here))
            for items in here:
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])
                ((((model(x[items]) - y[items]) ** 2).mean()) * len(items) / total).backward()
                for name, buffer in model.named_buffers():
                    sums[name] += buffer if buffer.dtype == torch.int64 else buffer * len(items) / total
            for name, buffer in model.named_buffers():
                buffer.copy_(sums[name] // len(here) if buffer.dtype == torch.int64 else sums[name])
            optimizer.step()
    return model


@pytest.fixture(autouse=True)
def dtype() -> Iterator[None]:
    """What `one_process` sets is not the next test's."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("memory", ["true", "false"], ids=["in shared memory", "by messages"])
@pytest.mark.parametrize("dead", [0, 2])
def test_the_others_go_on_exactly(dead: int, memory: str, survive: Start, tmp_path: Path) -> None:
    """Worker `dead` is killed before its sixth contribution. The next epoch's data are shared by two."""
    done = survive(KILL.format(rank=dead + 1, at=5), shared_memory=memory)
    assert done.returncode == 0, done.stderr
    others = [worker for worker in range(3) if worker != dead]
    assert (
        f"warning: worker {dead} (rank {dead + 1}) died after round 5: the run goes on with 2 of 3 workers; what is left"
        in done.stderr
    )
    assert re.findall(r"epoch \d, \d workers", done.stdout) == [
        "epoch 0, 3 workers",
        "epoch 1, 2 workers",
        "epoch 2, 2 workers",
    ]
    assert [float(row["samples"]) for row in metrics(tmp_path)] == [12.0] * 5 + [8.0] * (3 + 2 * 12)
    model = one_process(
        lambda epoch, step: [0, 1, 2] if not epoch and step < 5 else others, lambda epoch: others if epoch else [0, 1, 2]
    )
    found = saved(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-12), name
    assert json.loads((tmp_path / "run" / "DONE").read_text())["lost"] == [dead + 1]
    with h5py.File(max((tmp_path / "run" / "checkpoints").glob("*.h5"))) as file:  # what the first living worker keeps
        assert file["kept"]["seen"]["tensors"]["weight"][()].item() == EPOCHS - 1


def test_two_die_and_a_checkpoint_goes_on_with_all(survive: Start, tmp_path: Path) -> None:
    """The run is ended in the epoch in which workers have died; started again, all workers take part."""
    kill = "if (rank, ps.round) in ((2, 3), (3, 5)): os.kill(os.getpid(), signal.SIGKILL)"
    stop = "if ps.round == 6: ps.preempt()"
    done = survive(f"{kill}\n        {stop}")
    assert done.returncode == 75, done.stderr
    assert [float(row["samples"]) for row in metrics(tmp_path)] == [12.0] * 3 + [8.0] * 2 + [4.0] * 2
    again = survive("pass", resume="auto")
    assert again.returncode == 0, again.stderr
    assert re.findall(r"epoch \d, \d workers", again.stdout) == [f"epoch {epoch}, 3 workers" for epoch in range(3)]
    assert [float(row["samples"]) for row in metrics(tmp_path)][7:] == [12.0] * (1 + 2 * 8)


@pytest.mark.parametrize("mode", ["async", "ssp", "fedbuff"])
def test_the_batches_of_a_dead_worker_are_dealt_out_again(mode: str, survive: Start, tmp_path: Path) -> None:
    settings = {"local.steps": 2, "staleness.buffer": 2} if mode == "fedbuff" else {}
    steps = "steps = globals().get('steps', 0) + 1\n        "
    kill = "if rank == 2 and steps == 4: open('gone', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)\n        "
    others = "while rank != 2 and steps > 5 and not os.path.exists('gone'): time.sleep(0.01)\n        time.sleep(0.02)"
    done = survive(steps + kill + others, mode=mode, **settings)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 workers; its batches are dealt out again" in done.stderr
    assert "are not trained on" not in done.stderr
    assert sum(float(row["samples"]) for row in metrics(tmp_path)) == ROWS * EPOCHS


@pytest.mark.parametrize("mode", ["local_sgd", "diloco"])
def test_local_steps_go_on(mode: str, survive: Start, tmp_path: Path) -> None:
    steps = "steps = globals().get('steps', 0) + 1\n        "
    done = survive(f"{steps}if rank == 1 and steps == 5: os.kill(os.getpid(), signal.SIGKILL)", mode=mode, **{"local.steps": 2})
    assert done.returncode == 0, done.stderr
    assert "epoch 2, 2 workers" in done.stdout
    assert (
        sum(float(row["samples"]) for row in metrics(tmp_path)) == ROWS * EPOCHS - 16
    )  # two rounds of the first epoch lack its batches


FEDERATED = """
import mpips
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
clients = mpips.Clients.by_index((x, y), [range(k, k + n) for k, n in SIZES])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
ps = mpips.connect(model, optimizer, run_dir="run", checkpoint={"epochs": 0})
for epoch in ps.epochs(ROUNDS):
    for number, (a, b) in enumerate(ps.batches(clients, 4, shuffle=False)):
        optimizer.zero_grad()
        loss = ((model(a) - b) ** 2).mean()
        loss.backward()
        if (rank, epoch, number) == DIES: os.kill(os.getpid(), signal.SIGKILL)
        ps.step(loss)
"""
SIZES = [(0, 12), (12, 10), (21, 16), (37, 4), (41, 20), (61, 10)]
ROUNDS = 5


def federated(mode: str, dead: int, dies: int) -> nn.Module:
    """The model after rounds of all clients, but for those that `dead`, of three workers, hosted in the round `dies`."""
    found: dict[str, Any] = {}
    exec(MODEL, found)
    model, x, y = (found[name] for name in ("model", "x", "y"))
    everyone, sizes = list(range(len(SIZES))), [n for _, n in SIZES]
    for number in range(ROUNDS):
        hosted = hosts(everyone, 3, False, sizes)
        counts = [k for k in everyone if number != dies or k not in hosted[dead]]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        total = float(sum(sizes[k] for k in counts))
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in before.items()}
        steps = 0.0
        for k in counts:
            model.load_state_dict(before)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            first, n = SIZES[k]
            batches = [slice(at, min(at + 4, first + n)) for at in range(first, first + n, 4)]
            for batch in batches:
                optimizer.zero_grad()
                ((model(x[batch]) - y[batch]) ** 2).mean().backward()
                optimizer.step()
            steps += sizes[k] / total * len(batches)
            for name, tensor in model.state_dict().items():
                if tensor.dtype == torch.int64:  # those of the first client, if its worker lives
                    sums[name] = tensor.double() if k == 0 else sums[name] if 0 in counts else before[name].double()
                else:
                    by = len(batches) if mode == "fednova" and not name.endswith(("mean", "var")) else 1
                    sums[name] += (tensor - before[name]) / by * (sizes[k] / total)
        for name, tensor in before.items():
            if tensor.dtype == torch.int64:
                tensor.copy_(sums[name].long())
            else:
                tensor.add_(sums[name] * (steps if mode == "fednova" and not name.endswith(("mean", "var")) else 1))
        model.load_state_dict(before)
    return model


@pytest.mark.parametrize("memory", ["true", "false"], ids=["in shared memory", "by messages"])
@pytest.mark.parametrize(("mode", "dead"), [("fedavg", 0), ("fedavg", 2), ("fednova", 1)])
def test_clients_of_a_dead_worker_move_to_the_others(mode: str, dead: int, memory: str, survive: Start, tmp_path: Path) -> None:
    given = f"SIZES, ROUNDS, DIES = {SIZES}, {ROUNDS}, ({dead + 1}, 2, 3)\n"
    done = survive("", script=given + FEDERATED, mode=mode, shared_memory=memory)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 workers; its clients of this round do not count, and others host them from the next on" in done.stderr
    expected, found = federated(mode, dead, dies=2).state_dict(), saved(tmp_path)
    for name, tensor in expected.items():  # a round's change is a difference of weights here, and a mean of weights there
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-10), name
    everyone = sum(n for _, n in SIZES)
    lost = sum(SIZES[k][1] for k in hosts(range(6), 3, False, [n for _, n in SIZES])[dead])
    assert [float(row["samples"]) for row in metrics(tmp_path)] == [everyone] * 2 + [everyone - lost] + [everyone] * 2


def test_a_worker_that_is_stopped_is_killed_after_the_deadline(survive: Start, tmp_path: Path) -> None:
    done = survive("if rank == 3 and ps.round == 4: os.kill(os.getpid(), signal.SIGSTOP)", deadline=2)
    assert done.returncode == 0, done.stderr
    assert (
        "rank 3 was waited for by all others for longer than the deadline, 2 s: it is killed, and the others go on"
        in done.stderr
    )
    assert "the run goes on with 2 of 3 workers" in done.stderr


@pytest.mark.parametrize("settings", [{}, {"mode": "async"}, {"min_workers": 0}], ids=["rounds", "requests", "not wanted"])
def test_a_worker_that_ends_by_itself_ends_all(settings: dict[str, Any], survive: Start, tmp_path: Path) -> None:
    """MPI's fault tolerance does not tell of it."""
    done = survive("if rank == 2 and ps.round >= 3: open('t', 'w').close(); os._exit(7)", **settings)
    assert done.returncode == 1
    assert time.time() - (tmp_path / "t").stat().st_mtime < 10
    assert "rank 2 has ended in the middle of the run: all end" in done.stderr


def test_with_fewer_the_run_ends_and_is_started_again(survive: Start, tmp_path: Path) -> None:
    """From the last checkpoint, with all workers."""
    first = "os.path.exists('killed') or (open('killed', 'w').close(), os.kill(os.getpid(), signal.SIGKILL))"
    done = survive(f"if rank == 2 and ps.round == 9: {first}", min_workers=3, flags=("--ft", "--retries", "1"))
    assert done.returncode == 0, done.stderr
    assert "worker 1 (rank 2) died: 2 of 3 are left, min_workers is 3; the run ends" in done.stderr
    assert "attempt 1 of 1 to go on" in done.stderr
    assert [float(row["samples"]) for row in metrics(tmp_path)] == [12.0] * 24


VALIDATED = """
def measure():
    if rank == DIES[0] and epoch == 1: os.kill(os.getpid(), signal.SIGKILL)
    return 1.0
"""


@pytest.mark.parametrize("mode", ["sync", "async", "local_sgd"])
def test_the_worker_that_measures_dies_while_it_does(mode: str, survive: Start, tmp_path: Path) -> None:
    """The next one measures, and further loops have no place for the dead one."""
    script = TRAIN.replace("ps = mpips", "DIES = (1,)" + VALIDATED + "ps = mpips").replace(
        "lambda: float(((model(x) - y) ** 2).mean())", "measure"
    )
    done = survive("pass", script=script, mode=mode)
    assert done.returncode == 0, done.stderr
    assert "worker 0 (rank 1) died after round" in done.stderr
    assert "epoch 2, " in done.stdout
    rows = list(csv.DictReader((tmp_path / "run" / "validations.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]


def test_who_gives_what_all_keep_dies_while_the_last_checkpoint_is_gathered(survive: Start, tmp_path: Path) -> None:
    """All states are gathered again; the checkpoint has what the next worker keeps."""
    dies = """
class Dies(torch.nn.Linear):
    def state_dict(self, *given, **named):
        if rank == 1 and float(self.weight) == 2.0: os.kill(os.getpid(), signal.SIGKILL)
        return super().state_dict(*given, **named)
"""
    script = TRAIN.replace("ps = mpips", dies + "ps = mpips").replace("seen = torch.nn.Linear", "seen = Dies")
    done = survive("pass", script=script)
    assert done.returncode == 0, done.stderr
    assert "worker 0 (rank 1) died after round 24" in done.stderr
    with h5py.File(tmp_path / "run" / "checkpoints" / "round_00000024.h5") as file:
        assert file["kept"]["seen"]["tensors"]["weight"][()].item() == 2
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("memory", ["true", "false"], ids=["in shared memory", "by messages"])
def test_a_gradient_that_all_have_is_not_lost_with_one_of_them(memory: str, survive: Start, tmp_path: Path) -> None:
    """After clipping by hand all workers have the average; worker 0 dies before the step."""
    clips = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n        "
    done = survive(clips + KILL.format(rank=1, at=5), shared_memory=memory)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path)
    assert [float(row["samples"]) for row in rows] == [12.0] * 5 + [8.0] * (3 + 2 * 12)
    assert [int(row["version"]) for row in rows] == list(range(1, 33)), "a step in each round"


def test_who_asks_for_preemption_may_die_before_it(survive: Start, tmp_path: Path) -> None:
    done = survive("if rank == 2 and ps.round == 5: ps.preempt(); ps.step(loss); os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 75, done.stderr


def test_all_die_one_after_another_in_a_call(survive: Start, tmp_path: Path) -> None:
    script = TRAIN.replace("lambda: float(((model(x) - y) ** 2).mean())", "lambda: os.kill(os.getpid(), signal.SIGKILL)")
    done = survive("pass", script=script)
    assert done.returncode == 1
    assert "died: 0 of 3 are left, min_workers is 1; the run ends" in done.stderr


@pytest.mark.parametrize("settings", [{}, {"min_workers": 0}, {"mode": "async"}], ids=["rounds", "not wanted", "requests"])
def test_without_the_server_the_run_ends(settings: dict[str, Any], survive: Start, tmp_path: Path) -> None:
    kill = "if rank == 2 and ps.round >= 4: open('t', 'w').close(); os.kill(int(open('served').read()), signal.SIGKILL)"
    done = survive(kill, **settings)
    assert done.returncode == 1
    assert time.time() - (tmp_path / "t").stat().st_mtime < 10
    assert "rank 0 failed first" in done.stderr
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("when", ["before MPI", "before connect", "by an exception"])
def test_a_rank_that_ends_before_connect_ends_all(when: str, tmp_path: Path) -> None:
    """MPI's fault tolerance lets the others wait in MPI_Init, and a rank that aborts takes no other with it."""
    how = {
        "before MPI": "os.kill(os.getpid(), signal.SIGKILL)",
        "before connect": "from mpi4py import MPI; os.kill(os.getpid(), signal.SIGKILL)",
        "by an exception": "raise ValueError('on purpose')",
    }[when]
    body = f"import mpips\nif os.environ['OMPI_COMM_WORLD_RANK'] == '2': open('t', 'w').close(); {how}\n"
    (tmp_path / "train.py").write_text(MODEL + body + "mpips.connect(model, optimizer)\n")
    command = [sys.executable, "-m", "mpips.cli.main", "run", "-n", "4", "--timeout", "60", "--ft", "train.py"]
    done = run(command, tmp_path, timeout=70)
    assert done.returncode == 1
    assert time.time() - (tmp_path / "t").stat().st_mtime < 10
    assert "rank 2 failed first" in done.stderr


def test_a_further_run_of_the_script_does_not_begin_without_all() -> None:
    """Where some begin one and some do not, that is said, whoever is dead."""

    def server(*blobs: bytes) -> Any:
        return SimpleNamespace(rank=0, size=4, lost={2}, gather_bytes=lambda own: list(blobs), broadcast=lambda message: None)

    with pytest.raises(WorkersLostError, match="start the script again"):
        _meet_again(server(b"", b"next", b"", b"next"), b"")
    with pytest.raises(CallError, match="some connect again"):
        _meet_again(server(b"", b"next", b"", b""), b"")
    assert _meet_again(server(b"", b"", b"", b""), b"") == b""


def test_deaths_at_random_times(tmp_path: Path, record_property: Any) -> None:
    """The benchmark's check: the weights are those of the steps that counted."""
    record_property("faults", 2)
    command = [sys.executable, str(ROOT / "benchmarks" / "recovery.py"), "--runs", "1", "--deaths", "2", "--epochs", "4"]
    done = run(command, tmp_path, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers killed, 0 runs lost" in done.stdout
