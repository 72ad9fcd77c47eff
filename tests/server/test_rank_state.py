"""What a rank alone knows survives the wire, the file and a change in the number of workers."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpips import checkpoint
from mpips.data import Place, left
from mpips.process import rng
from mpips.run.keeping import pack, unpack
from mpips.server.rank_state import RankState, for_worker, pack_all, unpack_all

BUFFERS = [
    torch.tensor(3),
    torch.zeros(0, 2),
    torch.zeros(0),
    torch.ones(2, 3).t(),
    torch.tensor([True, False]),
    torch.tensor([-(2**63)]),
    torch.tensor([1 / 3], dtype=torch.bfloat16),
    torch.tensor([[1e-7]], dtype=torch.float16),
    torch.tensor([1j]),
]


def state(index: int = 2, buffers: dict[str, Tensor] | None = None, **place: object) -> RankState:
    return RankState(index, Place(**place), rng.capture(), buffers or {})  # type: ignore[arg-type]


def assert_same(a: RankState, b: RankState) -> None:
    assert (a.index, a.place) == (b.index, b.place)
    assert a.streams.keys() == b.streams.keys()
    for name, value in a.streams.items():
        assert value.dtype == b.streams[name].dtype
        assert np.array_equal(value, b.streams[name])
    assert a.buffers.keys() == b.buffers.keys()
    for name, tensor in a.buffers.items():
        assert tensor.dtype == b.buffers[name].dtype
        assert torch.equal(tensor, b.buffers[name])


@pytest.mark.parametrize("number", range(len(BUFFERS)))
def test_any_buffer_survives_the_wire(number: int) -> None:
    own = state(buffers={"0.running_mean": BUFFERS[number], "words": BUFFERS[number]})
    assert_same(RankState.unpack(own.pack()), own)


def test_a_place_survives_wire_and_file() -> None:
    own = state(3, {"b": torch.ones(2)}, epoch=4, loop=1, taken=9, over=True, cuts=[[1, 2], [3, 0, 4]])
    assert_same(RankState.unpack(own.pack()), own)
    path = checkpoint.save(Path(), 1, {"ranks": {"0": own.state_dict()}})
    assert_same(RankState.from_tree(checkpoint.load(path)["ranks"]["0"]), own)


def test_nothing_is_pickled() -> None:
    own = state(buffers={"b": torch.ones(2)})
    own.streams["odd"] = np.array([object()])
    with pytest.raises(TypeError, match="streams odd: an array of Python objects"):
        own.pack()


def test_what_has_travelled_leaves_nothing_for_the_garbage_collector() -> None:
    """Each array that numpy had read left four functions in a cycle: 5 KB a checkpoint, of a server of two workers."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            RankState.unpack(state(buffers={"b": torch.ones(2)}).pack())
            unpack(pack({"a": [torch.ones(2), {"b": (1, None)}]}, "thing"))
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [0, 1, 12])
def test_all_ranks_travel_together_and_in_order(count: int) -> None:
    states = [state(index, taken=index) for index in range(-1, count - 1)]
    again = unpack_all(pack_all(states))
    assert len(again) == count
    for a, b in zip(states, again, strict=True):
        assert_same(a, b)
        assert all(array.flags.writeable for array in b.streams.values())


def test_with_as_many_workers_each_takes_its_own_up() -> None:
    states = [state(-1), *(state(k, taken=10 + k, cuts=[[1, 2]]) for k in range(3))]
    for index in range(-1, 3):
        mine = for_worker(states, index, 3)
        assert mine is not None
        assert_same(mine, states[index + 1])


def test_another_number_of_workers_begins_at_the_items_nobody_had_taken() -> None:
    states = [state(k, {"b": torch.tensor(k)}, epoch=2, loop=1, taken=[5, 3][k], cuts=[[7]]) for k in (1, 0)]
    for index in range(3):
        mine = for_worker(states, index, 3)
        assert mine is not None
        assert mine.place == Place(2, 1, 0, False, [[7], [5, 3]])
        assert bool(mine.streams) == (index < 2)
        assert mine.buffers == ({"b": torch.tensor(index)} if index < 2 else {})


def test_between_loops_there_is_nothing_to_deal_out_anew() -> None:
    mine = for_worker([state(k, epoch=1, taken=4, over=True) for k in range(2)], 0, 5)
    assert mine is not None
    assert mine.place == Place(1, 0, 0, True, [])


def test_a_server_that_trains_is_a_worker_like_the_others() -> None:
    """Worker numbers count, and not ranks: with --server_trains worker 0 is on rank 0."""
    saved = [state(-1), state(0, taken=4), state(1, taken=5)]
    assert for_worker(saved, 1, 2).place.taken == 5  # type: ignore[union-attr]
    assert for_worker(saved[1:], -1, 2) is None  # it did not serve alone before
    assert for_worker([], 0, 2) is None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_every_item_is_taken_once_over_many_changes(n: int, sizes: list[int], chance: object) -> None:
    states = [RankState(k, Place(), {}) for k in range(sizes[0])]
    seen: list[int] = []
    for workers in sizes:
        going = [for_worker(states, k, workers) for k in range(workers)]
        states = []
        for k, own in enumerate(going):
            assert own is not None
            shard = list(left(range(n), own.place.cuts))[k::workers][own.place.taken :]
            count = chance.randint(0, len(shard))  # type: ignore[attr-defined]
            seen += shard[:count]
            own.place.taken += count
            states.append(RankState.unpack(own.pack()))
    rest = [for_worker(states, k, 7) for k in range(7)]
    for k, own in enumerate(rest):
        assert own is not None
        seen += list(left(range(n), own.place.cuts))[k::7]
    assert sorted(seen) == list(range(n))
