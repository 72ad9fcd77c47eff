"""Rounds in memory that ranks share: what each step promises, and the memory and semaphores beneath."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpips.comm import CommunicatorError, simulated
from mpips.comm import barrier as node
from mpips.comm import shared_memory as memory
from mpips.comm.barrier import SIZE, Semaphore
from mpips.comm.codecs import Codec
from mpips.comm.node_group import BufferSpec, NodeGroup
from mpips.comm.peer_buffers import PeerBuffers
from mpips.comm.simulated import SimulatedCommunicator, World
from mpips.comm.simulated_group import SimulatedBarrier
from mpips.model.flat import ALIGNMENT
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from tests.comm.test_mpi import as_simulated, on_mpi, on_one
from tests.conftest import ROOT
from tests.helpers.programs import OPTIMIZERS, cnn, data, sha, train

LENGTH, TAIL, LINES, ROUNDS = 40, 30, 4, 3


def contents(together: bool, numel: int = LENGTH) -> BufferSpec:
    where, dtype = slice(0, 4 * TAIL), torch.float32
    return BufferSpec(numel, dtype, TAIL, 4 * (TAIL + 2), where, dtype, LINES, 2, together, together, Codec(dtype))


def rounds(group: NodeGroup, together: bool, pause: Callable[[], None]) -> bool:
    """Rounds in which everything is written bit by bit, others coming in between, and whoever reads looks at all there is."""
    size = len(group.members)
    cuts = [TAIL * k // size for k in range(size + 1)] if together else [0, TAIL] + [TAIL] * (size - 1)
    span = slice(cuts[group.rank], cuts[group.rank + 1])
    group.serve([[slice(*ends) for ends in pairwise(cuts)]], slice(TAIL, TAIL))
    heard, answer = torch.zeros(LENGTH - TAIL), torch.zeros(2, dtype=torch.float64)
    weights = group.buffers.pull[: 4 * TAIL].view(torch.float32)
    control = group.buffers.pull[4 * TAIL :].view(torch.float32)

    def slowly(target: Tensor, value: float) -> None:
        for part in torch.split(target, max(1, len(target) // 2)):
            pause()
            part.fill_(value)

    class Take:
        def reduce_local(self, part: slice, rows: Any) -> None:
            for k in range(1, size):
                pause()
                assert (rows[k] == 10 * number + k).all(), "a push that is not whole, or of another round"
            pause()
            assert (rows[0] == 10 * number).all()
            slowly(rows[0], -number)

        def reduce_remote(self, part: slice, sums: Any) -> None:
            raise AssertionError("there is one node")

        def finalize(self, part: slice, total: Tensor) -> None:
            assert (total == -number).all()

    for number in range(1, 1 + ROUNDS):
        slowly(group.buffers.rows[group.rank], 10 * number + group.rank)
        group.reduce(1.0, heard, Take())
        if group.spans or group.leads:
            assert (heard == sum(10 * number + k for k in range(size))).all(), "a tail that is not whole"
        values = torch.full((LINES,), 100.0 * number + group.rank, dtype=torch.float64)
        for again in (0, 1000):  # as when gradients are clipped
            reported = group.report(values + again, "sum" if again else "min")
            pause()
            if group.leads:
                assert (group.buffers.gathered(slice(0, TAIL)) == -number).all(), "a slice that is not combined"
                every = [100 * number + k + again for k in range(size if together else 1)]
                assert reported[0] == (sum(every) if again else min(every))
                slowly(answer, number + again)
            group.decide(answer)
            pause()
            assert not together or (answer == number + again).all()
        slowly(weights[span], number)

        def fill(number: int = number) -> None:
            assert (weights == number).all(), "a slice that is not stepped"
            slowly(control, number)

        group.broadcast(fill)
        for value in (weights, control):
            pause()
            assert (value == number).all(), "a pull message that is not whole"
    return True


def simulate(size: int, together: bool, seed: int) -> list[bool]:
    world = World(size, seed=seed, shares=True)

    def program(e: SimulatedCommunicator) -> bool:
        group = e.node_group(contents(together))
        assert group
        return rounds(group, together, lambda: world.pause(e.rank))

    return world.run(program)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_round_keeps_its_promises_whatever_the_schedule(size: int, together: bool) -> None:
    for seed in range(20):
        assert simulate(size, together, seed) == [True] * size


@pytest.mark.parametrize("call", ["arrive", "release"])
@pytest.mark.parametrize(
    ("together", "hole"),
    [(False, 0), *((True, hole) for hole in range(4))],
    ids=["root", "combine", "report", "clip", "publish"],
)
def test_each_meeting_is_needed(together: bool, hole: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting there, some schedule breaks a promise."""

    class Loose(SimulatedBarrier):
        times = 0

        def arrive(self, meanwhile: Callable[[], object] | None = None) -> None:
            if not (self.leads and self._without("arrive")):
                super().arrive(meanwhile)

        def release(self) -> None:
            if self.leads or not self._without("release"):
                super().release()

        def _without(self, name: str) -> bool:
            world, rank = self.world, self.rank
            if name != call:
                return False
            self.times += 1
            if (self.times - 1) % (4 if together else 1) != hole:
                return False
            world.begin(rank, name)
            world.arrived_here[rank] += name == "arrive"
            return True

    monkeypatch.setattr(simulated, "SimulatedBarrier", Loose)
    with pytest.raises(AssertionError, match=r"not whole|not combined|not stepped|assert"):
        for seed in range(30):
            simulate(3, together, seed)


def test_ranks_that_do_not_ask_for_the_same_room_are_told() -> None:
    def program(e: SimulatedCommunicator) -> None:
        e.node_group(contents(True, LENGTH + e.rank))

    with pytest.raises(CommunicatorError, match="rank"):
        World(2, shares=True).run(program)
    assert World(2).run(lambda e: e.node_group(contents(True))) == [None, None]


class Node:
    """The communicator of ranks that are threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def Barrier(self) -> None:
        self._barrier.wait(30)

    def Bcast(self, array: Any, root: int) -> None:
        if self.rank == root:
            self._board[root] = array.copy()
        self.Barrier()
        array[...] = self._board[root]
        self.Barrier()

    def Allgather(self, own: Any, everyone: Any) -> None:
        self._board[self.rank] = own.copy()
        self.Barrier()
        everyone[...] = np.stack(self._board).reshape(everyone.shape)
        self.Barrier()


def on_threads(size: int, program: Callable[[Node], Any]) -> list[Any]:
    barrier, board = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def body(rank: int) -> None:
        try:
            results[rank] = program(Node(rank, size, barrier, board))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm, where others may be at work."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(memory, "FOLDER", str(folder))
    return folder


def test_mapped_memory_is_everybody_s_and_leaves_no_file(shm: Path) -> None:
    def program(own: Node) -> list[float]:
        found = memory.mapped(own, 4096 * 3, [slice(0, 4096 * 3)])
        assert found is not None
        assert list(shm.iterdir()) == []
        numbers = memory.tensor(found, 4096, 8 * own.size).view(torch.float64)
        assert not numbers.any() or own.rank
        own.Barrier()
        numbers[own.rank] = own.rank + 1
        own.Barrier()
        assert memory.tensor(found, 0, 0).numel() == 0
        return numbers.tolist()

    assert on_threads(3, program) == [[1, 2, 3]] * 3


def test_where_there_is_no_room_all_ranks_are_told(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert on_threads(3, lambda own: memory.mapped(own, 4096, [slice(0, 4096)])) == [None] * 3
    assert list(shm.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(memory, "FOLDER", "/nowhere")
    assert on_threads(3, lambda own: memory.mapped(own, 4096, [slice(0, 4096)])) == [None] * 3


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_where_a_rank_cannot_open_the_file_all_are_told(rank: int, shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container of its own it sees another /dev/shm."""
    genuine = os.open

    def opened(path: Any, *given: Any) -> int:
        if threading.current_thread().name == f"rank {rank}":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return genuine(path, *given)

    monkeypatch.setattr(os, "open", opened)
    assert on_threads(3, lambda own: memory.mapped(own, 4096, [slice(0, 4096)])) == [None] * 3
    assert list(shm.iterdir()) == []


def test_the_file_is_gone_before_its_memory_is_taken(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That may take seconds: a rank killed meanwhile leaves nothing behind."""
    left = []
    genuine = os.posix_fallocate

    def allocate(*given: Any) -> None:
        left.extend(shm.iterdir())
        genuine(*given)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert all(on_threads(2, lambda own: memory.mapped(own, 4096, [slice(0, 4096)]) is not None))
    assert left == []


def test_ranks_of_a_node_that_ask_for_different_sizes_get_nothing(shm: Path) -> None:
    assert on_threads(3, lambda own: node.mapped(own, [64, 8 + own.rank // 2])) == [None] * 3


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_rounds_between_real_semaphores(size: int, together: bool, shm: Path) -> None:
    def program(own: Node) -> bool:
        found = node.mapped(own, contents(together).sizes(size))
        assert found is not None
        for part, other in pairwise(found[0]):
            assert part.data_ptr() + part.numel() <= other.data_ptr()
            assert other.data_ptr() % memory.PAGE == 0
        (rows, pull, *parts), gates = found
        buffers = PeerBuffers(contents(together).messages(list(rows.view(size, -1))), own.rank, pull)
        group = NodeGroup(range(size), own.rank, buffers, parts, gates, contents(together))
        assert not any(row.data_ptr() % ALIGNMENT for row in group.buffers.rows), "kernels take another path"
        return all(rounds(group, together, lambda: time.sleep(0)) for _ in range(20))

    assert on_threads(size, program) == [True] * size


def semaphore() -> Semaphore:
    made = Semaphore(mmap.mmap(-1, 4096), SIZE)
    made.create()
    return made


def test_a_semaphore_counts() -> None:
    one = semaphore()
    for _ in range(3):
        one.post()
    for _ in range(3):
        one.take()
    thread = threading.Thread(target=one.take, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "it was not above zero"
    one.post()
    thread.join(10)
    assert not thread.is_alive()


def test_a_signal_is_handled_while_a_semaphore_is_waited_for() -> None:
    """It neither ends the wait nor has to wait itself; what its handler raises comes out."""
    one, handled = semaphore(), []

    def handler(*_: Any) -> None:
        handled.append(time.monotonic())
        if len(handled) == 3:
            one.post()
        if len(handled) == 5:
            raise InterruptedError

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)
    try:
        one.take()
        assert len(handled) == 3
        with pytest.raises(InterruptedError):
            one.take()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def trained(e: Any, **settings: Any) -> tuple[str, bool, dict[str, int]]:
    net = cnn()
    ps = train(e, net, OPTIMIZERS["adam"](net.parameters()), data(101), 7, 2, True, deterministic=True, clip=0.5, **settings)
    return sha(net), isinstance(ps._worker.server.transport, SharedMemoryTransport), dict(e.traffic)


def workers(**settings: Any) -> list[tuple[str, bool, dict[str, int]]]:
    """`trained` over MPI, of each worker."""
    results = on_mpi(as_simulated(lambda e: trained(e, **settings)))
    return [result for result in results if result is not None]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("plan", ["root", "sharded"])
@pytest.mark.parametrize("server_trains", [False, True])
def test_over_mpi_the_bits_are_those_of_the_simulated_run(plan: str, server_trains: bool) -> None:
    from mpi4py import MPI

    size, settings = MPI.COMM_WORLD.size, {"server_trains": server_trains}
    simulated = on_one(lambda: World(size).run(lambda e: trained(e, run_dir="simulated", **settings)))
    expected = [weights for weights, *_ in simulated]
    results = workers(run_dir="mpi", plan=plan, **settings)
    assert [weights for weights, *_ in results] == expected
    assert all(shared for _, shared, _ in results)
    assert not any(traffic.get("reduce calls", 0) for *_, traffic in results)
    by_messages = workers(run_dir="messages", shared_memory=False, **settings)
    assert [weights for weights, *_ in by_messages] == expected
    weights = 4 * sum(p.numel() for p in cnn().parameters())
    for (*_, ours), (*_, theirs) in zip(results, by_messages, strict=True):
        rounds_done = theirs["reduce calls"] // 2
        assert ours["broadcast bytes"] < theirs["broadcast bytes"] - (rounds_done - 1) * weights


@pytest.mark.mpi(min_size=2)
def test_without_room_a_run_goes_on_over_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    expected = [weights for weights, *_ in on_one(lambda: World(size).run(lambda e: trained(e, run_dir="simulated")))]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 0:
        monkeypatch.setattr(os, "posix_fallocate", full)
    results = workers(run_dir="mpi")
    assert [weights for weights, *_ in results] == expected
    assert not any(shared for _, shared, _ in results)
    assert all(traffic["reduce calls"] for *_, traffic in results)


def files() -> set[Path]:
    return set(Path(memory.FOLDER).glob("mpips-*"))


def still_there(before: set[Path]) -> set[Path]:
    """Files that have come and stay: other runs on this machine have theirs for a moment."""
    new = files() - before
    deadline = time.monotonic() + 5
    while new & files() and time.monotonic() < deadline:
        time.sleep(0.1)
    return new & files()


def test_nothing_is_left_in_memory_however_a_run_ends(mpirun: Any, tmp_path: Path) -> None:
    before = files()
    script = ROOT / "tests" / "helpers" / "resumable.py"
    whole = mpirun(3, script, "--epochs", 1, "--plan", "sharded", "--run_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    assert not still_there(before)
    killed = mpirun(3, script, "--epochs", 1, "--plan", "sharded", "--run_dir", "killed", "--die-at", 4, "--die-rank", 1)
    assert killed.returncode != 0
    assert not still_there(before)
