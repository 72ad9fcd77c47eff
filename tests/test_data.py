"""Shards: every item exactly once, in an order that only seed and epoch decide, and resumable at any item."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from mpips import rng
from mpips.data import Place, Shard, left

Batches = list[list[int]]
EPOCH = 3


def shard(data: Any, index: int = 0, workers: int = 1, seed: int = 5, **given: Any) -> Shard:
    return Shard(data, given.get("batch_size"), given.get("shuffle", True), given.get("drop_last", False), index, workers, seed)


def taken(own: Shard, place: Place | None = None) -> list[tuple[list[int], int, bool]]:
    """A worker's batches as lists of numbers, each with its count and whether it is known to be the last."""
    return [(numbers(batch), count, last) for batch, count, last in own.batches(place or Place(EPOCH))]


def numbers(batch: Any) -> list[int]:
    batch = batch[0] if isinstance(batch, list) else batch
    return torch.as_tensor(batch).view(-1).tolist()


def flat(batches: list[tuple[list[int], int, bool]]) -> list[int]:
    return [n for numbers, _, _ in batches for n in numbers]


class Numbers(Dataset):  # type: ignore[type-arg]
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return i


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class LongStream(Stream):
    """A stream that knows its length is one all the same."""

    def __len__(self) -> int:
        return self.n


class Own(Sampler[int]):
    """A sampler that draws from a stream of its choice."""

    def __init__(self, n: int, draw: Callable[[int], list[int]]) -> None:
        self.n, self.draw = n, draw

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(self.n))

    def __len__(self) -> int:
        return self.n


def loader(n: int, kind: str) -> DataLoader[Any]:
    """A user's DataLoader over n numbers."""
    ds = Numbers(n)
    kinds: dict[str, Callable[[], DataLoader[Any]]] = {
        "sequential": lambda: DataLoader(ds, batch_size=4),
        "shuffled": lambda: DataLoader(ds, batch_size=4, shuffle=True),
        "drop_last": lambda: DataLoader(ds, batch_size=4, shuffle=True, drop_last=True),
        "subset": lambda: DataLoader(ds, batch_size=4, sampler=SubsetRandomSampler(range(0, n, 2))),
        "weighted": lambda: DataLoader(ds, batch_size=4, sampler=WeightedRandomSampler([1.0] * n, n)),
        "replacement": lambda: DataLoader(ds, batch_size=4, sampler=RandomSampler(ds, replacement=True, num_samples=2 * n)),
        "generator": lambda: DataLoader(
            ds, batch_size=4, sampler=WeightedRandomSampler([1.0] * n, n, generator=torch.Generator())
        ),
        "few": lambda: DataLoader(ds, batch_size=4, sampler=RandomSampler(ds, num_samples=max(1, n // 2))),
        "many": lambda: DataLoader(ds, batch_size=4, sampler=RandomSampler(ds, num_samples=2 * n)),
        "python": lambda: DataLoader(ds, batch_size=4, sampler=Own(n, lambda n: random.sample(range(n), n))),
        "numpy": lambda: DataLoader(ds, batch_size=4, sampler=Own(n, lambda n: np.random.permutation(n).tolist())),
        "list": lambda: DataLoader(ds, batch_size=4, sampler=list(range(n - 1, -1, -1))),
        "batch_sampler": lambda: DataLoader(ds, batch_sampler=BatchSampler(RandomSampler(ds), 4, drop_last=False)),
        "own batches": lambda: DataLoader(ds, batch_sampler=[list(range(i, min(i + 3, n))) for i in range(0, n, 3)]),
        "no batches": lambda: DataLoader(ds, batch_size=None, shuffle=True),
        "collate": lambda: DataLoader(ds, batch_size=4, collate_fn=lambda items: torch.tensor(items)),
        "iterable": lambda: DataLoader(Stream(n), batch_size=4),
    }
    return kinds[kind]()


WHOLE = [
    "sequential", "shuffled", "python", "numpy", "list", "batch_sampler", "own batches", "no batches", "collate", "iterable",
]  # fmt: skip
KINDS = [*WHOLE, "drop_last", "subset", "weighted", "replacement", "generator", "few", "many"]


def once_each(kind: str, n: int, seed: int = 0) -> list[int]:
    """What one worker alone takes, on a machine whose streams are somewhere else."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return flat(taken(shard(loader(n, kind))))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 60), workers=st.integers(1, 7), batch_size=st.integers(1, 9), shuffle=st.booleans())
def test_shards_are_disjoint_and_complete_and_differ_by_one_item(n: int, workers: int, batch_size: int, shuffle: bool) -> None:
    given = (torch.arange(n),)
    shards = [taken(shard(given, k, workers, batch_size=batch_size, shuffle=shuffle)) for k in range(workers)]
    alone = flat(taken(shard(given, batch_size=batch_size, shuffle=shuffle)))
    assert [flat(own) for own in shards] == [alone[k::workers] for k in range(workers)]
    assert sorted(alone) == list(range(n))
    for own in shards:
        assert all(len(batch) == count == batch_size for batch, count, _ in own[:-1])
        assert [last for _, _, last in own] == [False] * (len(own) - 1) + [True] * bool(own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_s_items_are_dealt_out_alike_whatever_each_rank_s_streams_are(kind: str) -> None:
    n, workers = 23, 3
    alone = once_each(kind, n)
    own = []
    for k in range(workers):
        torch.manual_seed(100 + k)
        random.seed(100 + k)
        np.random.seed(100 + k)
        own.append(taken(shard(loader(n, kind), k, workers)))
    by_batch = kind in ("own batches", "iterable")
    if by_batch:
        batches = [b for b, _, _ in taken(shard(loader(n, kind)))]
        assert [[b for b, _, _ in mine] for mine in own] == [batches[k::workers] for k in range(workers)]
    elif kind == "drop_last":
        shares = [once_each("shuffled", n)[k::workers] for k in range(workers)]
        assert [flat(mine) for mine in own] == [share[: len(share) // 4 * 4] for share in shares]
    else:
        assert [flat(mine) for mine in own] == [alone[k::workers] for k in range(workers)]
    if kind in WHOLE:
        assert sorted(n for mine in own for n in flat(mine)) == list(range(23))


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_an_order_leaves_the_script_s_streams_alone(kind: str) -> None:
    own = shard(loader(12, kind))
    torch.manual_seed(1)
    before = rng.capture()
    taken(own)
    after = rng.capture()
    if kind == "iterable":  # a stream is the script's own loader, which draws a seed for its workers
        del before["torch"], after["torch"]
    assert all((before[name] == after[name]).all() for name in before)


def test_drawing_an_order_leaves_the_gpu_s_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(seed: int) -> None:
        raise AssertionError("the GPU's stream was set")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reset)
    taken(shard(loader(12, "weighted")))


@pytest.mark.parametrize("kind", ["shuffled", "weighted", "generator", "python", "numpy", "no batches", "few", "many"])
def test_each_epoch_and_each_seed_has_an_order_of_its_own(kind: str) -> None:
    orders = [flat(taken(shard(loader(40, kind), seed=seed), Place(epoch))) for seed in (0, 1000) for epoch in (0, 1)]
    again = flat(taken(shard(loader(40, kind), seed=0), Place(1)))
    assert len({tuple(order) for order in orders}) == 4
    assert again == orders[1]


def test_random_samples_come_from_all_items() -> None:
    seen = {n for epoch in range(20) for n in flat(taken(shard(loader(10, "few")), Place(epoch)))}
    assert seen == set(range(10))
    assert sorted(once_each("many", 10)) == sorted(2 * list(range(10)))


DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": lambda: {"data": (torch.arange(23), torch.arange(23)), "batch_size": 4},
    "list of tensors": lambda: {"data": list(torch.arange(23).split(4))},  # of batches
    "TensorDataset": lambda: {"data": TensorDataset(torch.arange(23)), "batch_size": 4},
    "dataset": lambda: {"data": Numbers(23), "batch_size": 4},
    "drop_last": lambda: {"data": Numbers(23), "batch_size": 4, "drop_last": True},
    "subset": lambda: {"data": Subset(Numbers(50), range(23)), "batch_size": 4},
    "array": lambda: {"data": np.arange(23), "batch_size": 4},
    "batches": lambda: {"data": [[2 * i, 2 * i + 1] for i in range(9)]},
    "iterator": lambda: {"data": ([i] for i in range(9))},
    "stream": lambda: {"data": Stream(9)},
    "long stream": lambda: {"data": LongStream(9)},
    **{kind: lambda kind=kind: {"data": loader(23, kind)} for kind in KINDS},
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", DATA)
def test_resuming_at_any_place_is_going_on(kind: str, workers: int) -> None:
    for index in range(workers):
        whole = taken(shard(index=index, workers=workers, **DATA[kind]()))
        assert whole
        for done in range(len(whole) + 1):
            place = Place(EPOCH, taken=sum(count for _, count, _ in whole[:done]))
            assert taken(shard(index=index, workers=workers, **DATA[kind]()), place) == whole[done:]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 50), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_other_numbers_of_workers_take_every_item_exactly_once(n: int, sizes: list[int], chance: random.Random) -> None:
    """Each set of workers takes some items and ends; the last set takes what is left."""
    cuts: list[list[int]] = []
    seen: list[int] = []
    for workers in sizes:
        own = [list(left(range(n), cuts))[k::workers] for k in range(workers)]
        cut = [chance.randint(0, len(mine)) for mine in own]
        seen += [item for mine, count in zip(own, cut, strict=True) for item in mine[:count]]
        cuts.append(cut)
    seen += left(range(n), cuts)
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("kind", ["tensors", "weighted", "own batches", "iterator", "iterable", "no batches"])
def test_a_cut_shard_goes_on_with_what_nobody_has_taken(kind: str) -> None:
    whole = [tuple(batch) for batch, _, _ in taken(shard(**DATA[kind]() | {"batch_size": None}))] if kind != "tensors" else []
    first = [taken(shard(index=k, workers=2, **DATA[kind]())) for k in range(2)]
    cut = [sum(count for _, count, _ in mine[:steps]) for mine, steps in zip(first, (2, 1), strict=True)]
    before = first[0][:2] + first[1][:1]
    place = Place(EPOCH, cuts=[cut])
    after = [batch for k in range(3) for batch in taken(shard(index=k, workers=3, **DATA[kind]()), place)]
    everything = flat(first[0] + first[1])
    assert sorted(flat(before + after)) == sorted(everything)
    assert not whole or sorted(everything) == sorted(n for batch in whole for n in batch)


EMPTY = {
    "tensors": {"data": (torch.zeros(0, 2),), "batch_size": 4},
    "dataset": {"data": Numbers(0), "batch_size": 4},
    "fewer than workers": {"data": Numbers(2), "batch_size": 4},
    "dropped": {"data": Numbers(7), "batch_size": 4, "drop_last": True},
    "no tuple": {"data": (), "batch_size": 4},
    "no list": {"data": []},
    "loader": {"data": DataLoader(Numbers(2), batch_size=4)},
    "no batch": {"data": iter([])},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_shard_has_no_batches(kind: str) -> None:
    assert taken(shard(index=2, workers=3, **EMPTY[kind])) == []


@pytest.mark.parametrize(("given", "words"), [
    ({"data": Numbers(9)}, "batch_size is missing"),
    ({"data": (torch.zeros(3),)}, "batch_size is missing"),
    ({"data": DataLoader(Numbers(9), batch_size=2), "batch_size": 2}, "batch_size=2 given with a DataLoader"),
    ({"data": [[1], [2]], "batch_size": 2}, "batch_size=2 given with an iterable of batches"),
    ({"data": Stream(9), "batch_size": 2}, "batch_size=2 given with an iterable of batches"),
    ({"data": Numbers(9), "batch_size": 0}, "batch_size=0 given; expected a whole number, 1 or more"),
    ({"data": Numbers(9), "batch_size": -3}, "batch_size=-3 given; expected a whole number, 1 or more"),
    ({"data": Numbers(9), "batch_size": 2.0}, r"batch_size=2\.0 given; expected a whole number"),
])  # fmt: skip
def test_a_batch_size_that_says_nothing_is_an_error(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard(**given)


def test_a_loader_keeps_its_own_ways() -> None:
    def collate(items: list[int]) -> dict[str, Any]:
        return {"items": items}

    given = DataLoader(Numbers(10), batch_size=4, collate_fn=collate)
    batches = [batch for batch, _, _ in shard(given, 1, 2).batches(Place())]
    assert batches == [{"items": [1, 3, 5, 7]}, {"items": [9]}]


class Noisy(Numbers):
    def __getitem__(self, i: int) -> float:  # type: ignore[override]
        return torch.rand(()).item()


def test_loader_workers_of_different_ranks_have_noise_of_their_own() -> None:
    def draw(index: int) -> list[float]:
        given = DataLoader(Noisy(4), batch_size=2, num_workers=1)
        return [x for batch, _, _ in shard(given, index, 2).batches(Place()) for x in batch.tolist()]

    assert draw(0) == draw(0)
    assert not set(draw(0)) & set(draw(1))


def test_places_step_through_loops_and_epochs() -> None:
    place = Place(1, 0, 7, True, [[3, 4]])
    place.next_loop()
    assert place == Place(1, 1)
    place.taken, place.over = 5, True
    place.next_epoch()
    assert place == Place(2)


def test_sequential_loaders_are_not_drawn() -> None:
    """An order over a very long dataset is not made a list of random numbers when it need not be."""
    given = DataLoader(Numbers(10), batch_size=3, sampler=SequentialSampler(Numbers(10)))
    assert flat(taken(shard(given))) == list(range(10))


def deal(
    data: Callable[[], Any], workers: int, order: list[int], turns: Callable[[int], int], **given: Any
) -> list[list[tuple[int, list[int], int]]]:
    """Each worker's (ticket, items, count), where `turns` says which of those still taking asks next."""
    left_over = iter(order)
    shards = [shard(data(), k, workers, **given) for k in range(workers)]
    got: list[list[int]] = [[] for _ in range(workers)]

    def next_ticket(k: int) -> int | None:
        if (ticket := next(left_over, None)) is not None:
            got[k].append(ticket)
        return ticket

    streams = {k: own.dealt(EPOCH, lambda k=k: next_ticket(k)) for k, own in enumerate(shards)}
    taken: list[list[tuple[int, list[int], int]]] = [[] for _ in range(workers)]
    while streams:
        k = list(streams)[turns(len(streams))]
        if (found := next(streams[k], None)) is None:
            del streams[k]
            continue
        batch, count, last = found
        assert not last
        taken[k].append((got[k][len(taken[k])], numbers(batch), count))
    return taken


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 60), workers=st.integers(1, 5), batch_size=st.integers(1, 9), shuffle=st.booleans(), drop=st.booleans(),
    chance=st.randoms(use_true_random=False),
)  # fmt: skip
def test_dealt_batches_hold_every_item_once_whoever_takes_them(
    n: int, workers: int, batch_size: int, shuffle: bool, drop: bool, chance: random.Random
) -> None:
    given = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop}
    data = (torch.arange(n),)
    alone = [numbers for numbers, _, _ in taken(shard(data, **given))]
    tickets = shard(data, **given).tickets(EPOCH)
    assert tickets == len(alone)
    order = chance.sample(range(tickets), tickets)
    mine = deal(lambda: data, workers, order, chance.randrange, **given)
    assert all(items == alone[ticket] and len(items) == count for own in mine for ticket, items, count in own)
    assert sorted(ticket for own in mine for ticket, _, _ in own) == list(range(tickets))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "iterable"])
def test_a_ticket_names_the_same_batch_on_all_workers_whatever_loader_is_given(kind: str) -> None:
    alone = [numbers for numbers, _, _ in taken(shard(loader(23, kind)))]
    counts = [count for _, count, _ in taken(shard(loader(23, kind)))]
    for k in range(3):
        torch.manual_seed(100 + k)
        random.seed(100 + k)
        np.random.seed(100 + k)
        own = shard(loader(23, kind), k, 3)
        assert own.tickets(EPOCH) == len(alone)
        backwards = [*reversed(range(len(alone))), None]
        before = rng.capture()
        got = [(numbers(batch), count) for batch, count, _ in own.dealt(EPOCH, iter(backwards).__next__)]
        assert all((before[name] == state).all() for name, state in rng.capture().items())
        assert got == list(zip(alone, counts, strict=True))[::-1]


@pytest.mark.parametrize("kind", ["tensors", "dataset", "collate", "no batches", "own batches", "subset"])
def test_a_ticket_is_asked_for_when_its_batch_is(kind: str) -> None:
    asked = []

    def next_ticket() -> int | None:
        asked.append(len(asked))
        return asked[-1] if asked[-1] < 3 else None

    batches = shard(**DATA[kind]()).dealt(EPOCH, next_ticket)
    assert asked == []
    for number in range(3):
        next(batches)
        assert asked == list(range(number + 1))
    assert next(batches, None) is None
    assert next(batches, None) is None
    assert asked == [0, 1, 2, 3]


def test_a_loader_s_own_workers_fetch_ahead_and_ask_on_the_caller_s_thread() -> None:
    tickets, asked, ahead = iter([4, 1, 0, 5, 3, 2]), [], []

    def next_ticket() -> int | None:
        assert threading.current_thread() is threading.main_thread()
        if (ticket := next(tickets, None)) is not None:
            asked.append(ticket)
        return ticket

    given = DataLoader(Numbers(23), batch_size=4, num_workers=2, prefetch_factor=1, collate_fn=list)
    own, got = shard(given), []
    for batch, count, _ in own.dealt(EPOCH, next_ticket):
        got.append((batch, count))
        ahead.append(len(asked) - len(got))
    plain = shard((torch.arange(23),), batch_size=4, shuffle=False)
    alone = [items for items, _, _ in taken(plain)]
    assert own.tickets(EPOCH) == 6
    assert got == [(alone[ticket], len(alone[ticket])) for ticket in asked]
    assert asked == [4, 1, 0, 5, 3, 2]
    assert max(ahead) == 2


@pytest.mark.parametrize("kind", ["list of tensors", "iterator", "stream", "long stream", "iterable", "own"])
def test_streams_and_a_rank_s_own_data_are_not_dealt(kind: str) -> None:
    own = Shard(Numbers(9), 2, True, False, 0, 1, 5, own=True) if kind == "own" else shard(**DATA[kind]())
    assert own.tickets(EPOCH) is None
    with pytest.raises(ValueError, match="not dealt out in batches; iterate over `batches`"):
        own.dealt(EPOCH, lambda: None)


@pytest.mark.parametrize("ticket", [-1, 6])
def test_a_ticket_for_no_batch_is_an_error(ticket: int) -> None:
    with pytest.raises(IndexError, match=f"ticket {ticket} given; epoch 3 has 6 batches, from 0"):
        next(shard(Numbers(23), batch_size=4).dealt(EPOCH, lambda: ticket))


def test_a_sampler_of_the_user_s_own_is_drawn_once_for_a_dealt_epoch() -> None:
    drawn = []
    given = DataLoader(Numbers(9), batch_size=4, sampler=Own(9, lambda n: drawn.append(n) or list(range(n))))  # type: ignore[func-returns-value]
    own = shard(given)
    assert own.tickets(EPOCH) == 3
    assert len(list(own.dealt(EPOCH, iter([0, 1, 2, None]).__next__))) == 3
    assert drawn == [9]


class Doubled(TensorDataset):
    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        return tuple(2 * t for t in super().__getitem__(i))


def test_rows_of_tensors_are_what_torch_fetches() -> None:
    pairs = TensorDataset(torch.randn(12, 2), torch.arange(12))
    inner = Subset(pairs, [*range(11, 1, -1)])
    for data in (
        pairs,
        inner,
        Subset(inner, np.array([3, 1, 7, 8])),
        Doubled(*pairs.tensors),
        Subset(Doubled(*pairs.tensors), [5, 3]),
    ):
        ours = [batch for batch, _, _ in shard(data, batch_size=4, shuffle=False).batches(Place())]
        for mine, torch_s in zip(ours, DataLoader(data, batch_size=4), strict=True):
            assert type(mine) is type(torch_s) is list
            assert all(torch.equal(a, b) for a, b in zip(mine, torch_s, strict=True))


def test_tensors_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shapes \[\(3, 2\), \(4,\)\] given; expected the same first dimension"):
        shard((torch.zeros(3, 2), torch.zeros(4)), batch_size=2)
