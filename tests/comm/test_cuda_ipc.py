"""Rounds in the memory of several devices: the same bits as without. Here the devices are simulated; see test_gpu."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpips.comm import CommunicatorError, simulated
from mpips.comm import cuda_ipc as devices
from mpips.comm.cuda_ipc import StreamSyncBarrier
from mpips.comm.mpi import MpiCommunicator
from mpips.comm.simulated import World
from mpips.comm.simulated_group import SimulatedBarrier
from tests.comm import test_node_group
from tests.promises.test_resume import assert_same
from tests.reduce import test_shared_memory_transport
from tests.reduce.test_shared_memory_transport import ELEMENTWISE, assert_alike, odd

TAKEN_OVER = [
    "a_run_resumes_under_another_plan",
    "a_scheduler_reaches_all_slices",
    "a_sum_that_overflows_is_the_servers",
    "buffers_are_as_without_shared_memory",
    "gradients_left_over_from_an_interrupted_loop_are_pushed_with_the_next",
    "killed_anywhere_and_resumed",
    "more_ranks_than_there_is_to_serve",
    "nonfinite_raise_names_rank_and_tensor_and_moves_nothing",
    "nonfinite_skip_and_drop_are_as_without_shared_memory",
    "normclip_shortens_each_contribution",
    "the_server_s_word_ends_a_run",
]
globals().update({f"test_{name}": getattr(test_shared_memory_transport, f"test_{name}") for name in TAKEN_OVER})
small_pieces = test_shared_memory_transport.small_pieces
PLACES = [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2], [0, 1, 2, 3]]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shares memory in the tests that are taken over does so on two devices."""

    def sharing(size: int, seed: int = 0) -> World:
        return World(size, seed=seed, shares=True, devices=[n % 2 for n in range(size)])

    monkeypatch.setattr(test_shared_memory_transport, "sharing", sharing)


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("chosen", ["root", "sharded"])
def test_where_ranks_are_changes_no_bit(chosen: str, places: list[int]) -> None:
    for name, settings in (("momentum", {}), ("adam", {"clip": 0.05, "server_trains": True})):
        given: dict[str, Any] = {"deterministic": True, **settings}
        expected, tree = odd(World(4), ELEMENTWISE[name], torch.float32, (False, False), **given)
        world = World(4, seed=3, shares=True, devices=places)
        shared = (True, chosen == "sharded")
        ours, own = odd(world, ELEMENTWISE[name], torch.float32, shared, plan=chosen, run_dir=f"{chosen}-{name}", **given)
        assert_alike(ours, expected)
        assert_same(own, tree)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("places", [[0, 0, 0], [0, 1, 1], [0, 1, 2]], ids=str)
def test_a_round_keeps_its_promises(together: bool, places: list[int]) -> None:
    for seed in range(10):
        world = World(3, seed=seed, shares=True, devices=places)

        def program(e: simulated.SimulatedCommunicator, world: World = world) -> bool:
            group = e.node_group(test_node_group.contents(together))
            assert group
            return test_node_group.rounds(group, together, lambda: world.pause(e.rank))

        assert world.run(program) == [True] * 3


@pytest.mark.parametrize("needed", [True, False])
def test_what_a_rank_has_its_device_do_is_done_before_others_are_let_go_on(
    needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device works late: only when it is waited for. Without that, ranks find the round before."""
    late: dict[int, list[Any]] = {}

    def work(rank: int) -> None:
        while needed and late.get(rank):
            late[rank].pop(0)()

    class Late(StreamSyncBarrier):
        def __init__(self, *given: Any) -> None:
            self._gates = SimulatedBarrier(*given)
            super().__init__(self._gates, lambda: work(self._gates.rank))

        def release(self) -> None:
            super().release()
            self._gates.world.pause(self._gates.rank)  # others go on before this rank does anything more

    class PeerBuffers(devices.CudaPeerBuffers):
        def copy_to_peers(self, part: slice) -> None:
            late.setdefault(self.place, []).append(lambda: devices.CudaPeerBuffers.copy_to_peers(self, part))

    monkeypatch.setattr(simulated, "SimulatedBarrier", Late)
    monkeypatch.setattr(simulated, "CudaPeerBuffers", PeerBuffers)
    world = World(3, shares=True, devices=[0, 1, 2])
    given: dict[str, Any] = {"deterministic": True, "plan": "sharded"}
    if needed:
        ours, _ = odd(world, ELEMENTWISE["momentum"], torch.float32, (True, True), **given)
        expected, _ = odd(World(3), ELEMENTWISE["momentum"], torch.float32, deterministic=True)
        assert_alike(ours, expected)
    else:
        with pytest.raises(CommunicatorError, match="rank 1 is in round 0, the server in 1"):
            odd(world, ELEMENTWISE["momentum"], torch.float32, (True, True), **given)


# How ranks map each other's memory, with threads for ranks and a table for the driver

SEES_ALL = [["a", "b"], ["b", "a"], ["a", "b"]]  # the cards that each rank sees, the last of which is its own


def mapped(monkeypatch: pytest.MonkeyPatch, seen: list[list[str]], fails: dict[int, Any] | None = None) -> list[Any]:
    """What `devices.mapped` gives to each rank; `fails` says of whom a handle is what."""
    mine, table = threading.local(), dict[bytes, torch.Tensor]()

    def handle(own: torch.Tensor) -> bytes:
        found = (fails or {}).get(mine.rank, f"{mine.rank} {own.numel()}".encode())
        if isinstance(found, Exception):
            raise found
        table[found] = own
        return bytes(found)

    def open_it(handle: bytes, device: int) -> torch.Tensor:
        if handle not in table:
            raise ValueError("no handle")
        return table[handle]

    monkeypatch.setattr(devices, "_name", lambda number: seen[mine.rank][number].encode())
    monkeypatch.setattr(devices, "_handle", handle)
    monkeypatch.setattr(devices, "_open", open_it)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen[mine.rank]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def program(node: test_node_group.Node) -> Any:
        mine.rank = node.rank
        return devices.mapped(node, test_node_group.contents(True))

    return test_node_group.on_threads(len(seen), program)


def test_ranks_map_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mapped(monkeypatch, SEES_ALL)
    held = test_node_group.contents(True)
    for rows, pulls, places in found:
        assert places == [0, 1, 0]
        assert [row.numel() for row in rows] == [held.row] * 3
        assert [pull.numel() for pull in pulls] == [held.pull] * 2
        assert [t.data_ptr() for t in (*rows, *pulls)] == [t.data_ptr() for t in (*found[0][0], *found[0][1])]
    assert len({t.data_ptr() for t in (*found[0][0], *found[0][1])}) == 5


@pytest.mark.parametrize(
    ("seen", "fails"),
    [
        ([["a"], ["b"], ["c"]], {}),
        ([["a", "b"], ["b", "a"], ["b"]], {}),
        (SEES_ALL, {1: RuntimeError("out of memory")}),
        (SEES_ALL, {0: b"x" * devices.WORD}),
    ],
    ids=["each its own", "one its own", "no room", "a long handle"],
)
def test_if_one_rank_cannot_map_the_others_memory_none_does(
    seen: list[list[str]], fails: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mapped(monkeypatch, seen, fails) == [None] * 3


def placed(
    monkeypatch: pytest.MonkeyPatch, nodes: list[list[int]], cuda_aware: bool = False
) -> tuple[Any, list[Any], list[Any]]:
    """The room that MPI's third rank, 12, gets, whose memory is this process'; what it waited for, and what was pinned."""
    from mpips.comm import mpi

    waited, pinned = list[Any](), list[Any]()
    held = replace(test_node_group.contents(True), device=torch.device("cuda"))
    rows = [torch.zeros(held.row, dtype=torch.uint8) for _ in range(3)]
    pull = torch.zeros(held.pull, dtype=torch.uint8)
    gates = SimpleNamespace(leads=False, arrive=lambda meanwhile=None: None, release=lambda: None)

    def mapped(node: Any, sizes: list[int], awake: float, waits: Any, find_lost: Any) -> Any:
        assert sizes[:2] == [0, 0], "messages are not in the host's memory"
        return [torch.zeros(size, dtype=torch.uint8) for size in sizes], gates

    def opened(node: Any, device: torch.device, nbytes: int, owners: list[int]) -> list[torch.Tensor]:
        assert (device.type, owners) == ("cuda", [0])
        return [torch.full((nbytes,), 1, dtype=torch.uint8)]

    monkeypatch.setattr(mpi, "mapped", mapped)
    monkeypatch.setattr(devices, "mapped", lambda node, contents: (rows, [pull, pull.clone()], [0, 1, 1]))
    monkeypatch.setattr(devices, "opened", opened)
    monkeypatch.setattr(devices, "pin", lambda part, buffers: pinned.append(part))
    monkeypatch.setattr(mpi, "finish", waited.append)
    communicator = SimpleNamespace(Split=lambda color, key: None)
    end = SimpleNamespace(
        rank=12,
        _waits=None,
        find_lost=None,
        _bucket=1 << 20,
        _cuda_aware=cuda_aware,
        allgather_digests=lambda word: [word] * 3,
        comm=communicator,
        _mpi=SimpleNamespace(UNDEFINED=-1),
    )
    end._staged, end._sizes = (partial(method, end) for method in (mpi.MpiCommunicator._staged, mpi.MpiCommunicator._sizes))
    group = mpi.MpiCommunicator._group(end, SimpleNamespace(rank=2, size=3), nodes, held)  # type: ignore[arg-type]
    assert group is not None
    assert group.buffers.rows[2].data_ptr() == rows[2].data_ptr()
    return group, waited, pinned


def test_each_rank_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    group, waited, _ = placed(monkeypatch, [[10, 11, 12]])
    group.barrier()
    assert len(waited) == 1
    assert waited[0] is group.buffers.row


def test_what_leaves_a_node_is_pinned_or_on_its_leaders_device(monkeypatch: pytest.MonkeyPatch) -> None:
    group, _, pinned = placed(monkeypatch, [[0, 1], [10, 11, 12]])
    assert [part.data_ptr() for part in pinned] == [group._window.data_ptr(), group._outbox.data_ptr()]
    assert not group._outbox.any()
    group, _, pinned = placed(monkeypatch, [[0, 1], [10, 11, 12]], cuda_aware=True)
    assert not pinned
    assert group._outbox.all() and group._window.all(), "what MPI sends itself"


@pytest.mark.parametrize("error", [0, 712])
def test_what_is_pinned_is_let_go_with_its_board(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it cannot be, a kernel is told of it, and nobody else."""
    said: list[Any] = []
    driver = SimpleNamespace(
        cudaHostRegister=lambda at, nbytes, flags: said.append(("register", at, nbytes)) or error,
        cudaHostUnregister=lambda at: said.append(("unregister", at)),
    )
    memory = torch.zeros(64, dtype=torch.uint8)
    buffers = devices.PeerBuffers([torch.zeros(4)], 0, torch.zeros(8, dtype=torch.uint8))
    at = memory.data_ptr()

    def zeros(*_: Any, device: Any) -> None:
        said.append("kernel")
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch, "zeros", zeros)
    devices.pin(memory, buffers)
    devices.pin(memory[:0], buffers)
    del memory
    expected: list[Any] = [("register", at, 64)]
    assert said == expected + ["kernel"] * (error > 0)
    del buffers
    assert said[1:] == (["kernel"] if error else [("unregister", at)])


def test_work_beside_is_on_the_stream_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        inside.append(stream)
        yield
        inside.pop()

    done: list[str] = []
    work = lambda: done.append("".join(inside))  # noqa: E731
    assert devices.as_here(work) is work, "without a GPU"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "its own")
    monkeypatch.setattr(torch.cuda, "stream", on)
    there = devices.as_here(work)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the thread's")
    there()
    assert done == ["its own"]
    with ThreadPoolExecutor(1) as beside:
        end: Any = SimpleNamespace(_threads=True, _beside=beside)
        monkeypatch.setattr(devices, "as_here", lambda work: partial(done.append, "as here"))
        MpiCommunicator.run_async(end, work)()
    assert done[1:] == ["as here"]
