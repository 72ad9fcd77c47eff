"""Rounds between nodes whose messages lie on simulated devices: staged, with the same bits as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpips.comm import simulated
from mpips.comm.cuda_ipc import StreamSyncBarrier
from mpips.comm.reduce_scatter import ReduceScatterGroup
from mpips.comm.simulated import SimulatedCommunicator, World
from mpips.comm.simulated_group import SimulatedBarrier
from tests.comm import test_multi_node, test_root_reduce
from tests.comm.test_multi_node import CODECS, MAKE, SHAPES, Shape, cut, even, rounds, uneven
from tests.reduce.test_shared_memory_transport import Odd, assert_alike

small_pieces = test_multi_node.small_pieces
tiny_pieces = test_multi_node.tiny_pieces
TAKEN_OVER = {
    test_multi_node: [
        "a_rank_that_dies_anywhere_ends_the_others_and_the_run_resumes",
        "more_ranks_than_there_is_to_serve",
        "nonfinite_raise_names_rank_and_tensor_and_moves_nothing",
        "nonfinite_skip_and_drop_are_as_by_messages",
        "only_rounding_differs_for_any_batches_and_clipped",
        "statistics_are_averaged_whichever_node_serves_all_tensors",
        "the_checkpoint_is_the_same_whatever_the_nodes",
        "weights_stay_within_one_rounding_of_the_masters",
    ],
    test_root_reduce: [
        "the_weights_are_those_of_plain_pytorch_in_the_documented_order",
        "a_sum_that_overflows_between_nodes_is_not_taken",
    ],
}
for module, names in TAKEN_OVER.items():
    globals().update({f"test_{name}": getattr(module, f"test_{name}") for name in names})


def on_devices(shape: Shape, seed: int = 0, bucket: int = 3000, each: int = 2) -> World:
    """So many devices on each node, which its ranks have in turn; on the second the first rank has the last one."""
    places = [10 * node + (rank + node) % each for node, ranks in enumerate(shape) for rank in range(ranks)]
    return World(sum(shape), seed=seed, shares=True, nodes=shape, bucket=bucket, devices=places)


@pytest.fixture(autouse=True)
def two_devices_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in TAKEN_OVER:
        monkeypatch.setattr(module, "on_nodes", on_devices)


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("wire", ["full", "bfloat16"])
def test_where_ranks_are_changes_no_bit(wire: str, each: int) -> None:
    """They add up in the order of ranks; whose slice it is decides nothing."""
    for shape in ([2, 2], [1, 3], [2, 1, 2]):
        settings: dict[str, Any] = {"clip": 0.1, "samples": (4, 16, 8, 2), "rounds": 3, "comm_dtype": wire}
        host = World(sum(shape), seed=1, shares=True, nodes=shape, bucket=3000)
        expected = uneven(host, Odd, MAKE["adam"], **settings)
        assert_alike(uneven(on_devices(shape, 2, each=each), Odd, MAKE["adam"], **settings), expected[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_come_back_as_they_are(dtype: torch.dtype) -> None:
    for wire in ("full", "bfloat16"):
        settings: dict[str, Any] = {"samples": (4, 16, 8, 2), "rounds": 3, "comm_dtype": wire}
        host = World(4, seed=1, shares=True, nodes=[2, 2], bucket=3000)
        expected = uneven(host, lambda: Odd().to(dtype), MAKE["momentum"], **settings)
        assert_alike(expected, expected[:1])
        assert_alike(uneven(on_devices([2, 2], 2), lambda: Odd().to(dtype), MAKE["momentum"], **settings), expected[:1])


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if sum(shape) < 8], ids=str)
def test_a_round_keeps_its_promises_whatever_the_schedule(shape: Shape, kind: str, tiny_pieces: None) -> None:
    codec, step = CODECS[kind], 5
    for seed in range(3):
        world = on_devices(shape, seed, step * codec.bytes(1) * (len(shape) - 1))

        def program(e: SimulatedCommunicator, world: World = world) -> None:
            group = e.node_group(test_multi_node.contents(codec, kind == "overlap"))
            assert isinstance(group, ReduceScatterGroup)
            rounds(group, cut(shape, even(shape), 2), None, lambda: world.pause(e.rank))

        world.run(program)


@pytest.mark.parametrize("needed", [True, False])
def test_what_a_rank_has_its_device_do_is_done_before_others_are_let_go_on(
    needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies to other devices, to the outbox and from the window are made only when the device is waited for."""
    late: dict[int, list[Callable[[], object]]] = {}

    def work(rank: int) -> None:
        while needed and late.get(rank):
            late[rank].pop(0)()

    class Late(StreamSyncBarrier):
        def __init__(self, *given: Any) -> None:
            self._gates = SimulatedBarrier(*given)
            super().__init__(self._gates, lambda: work(self._gates.rank))

        def release(self) -> None:
            super().release()
            self._gates.world.pause(self._gates.rank)

    class MultiNodeGroup(ReduceScatterGroup):
        def _follow(self, *given: Any) -> None:
            late.setdefault(self.rank, []).append(lambda: ReduceScatterGroup._follow(self, *given))

        def _give(self, *given: Any) -> None:
            late.setdefault(self.rank, []).append(lambda: ReduceScatterGroup._give(self, *given))

    monkeypatch.setattr(simulated, "SimulatedBarrier", Late)
    monkeypatch.setattr(simulated, "ReduceScatterGroup", MultiNodeGroup)
    settings: dict[str, Any] = {"samples": (4, 16, 8, 2), "rounds": 3}
    expected = uneven(World(4, shares=True, nodes=[2, 2], bucket=3000), Odd, MAKE["momentum"], **settings)
    ours = uneven(on_devices([2, 2]), Odd, MAKE["momentum"], **settings)
    if needed:
        assert_alike(ours, expected[:1])
    else:
        with pytest.raises(AssertionError):
            assert_alike(ours, expected[:1])
