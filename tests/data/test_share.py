"""Shares: one worker is plain PyTorch, several are one process with their batches joined; resumable at any item."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from mpips.data import Part, Place, left
from mpips.data.common import Common
from mpips.data.loader import sharded
from mpips.data.samples import samples_in
from mpips.data.share import Share
from mpips.process import rng

SEED, EPOCH = 11, 3
Taken = tuple[list[Any], int, int | None]  # a batch's numbers, its items and samples


def seed(number: int = SEED) -> None:
    """What a script does first."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def share(data: Any, index: int = 0, workers: int = 1, common: Common | None = None, own: bool = False, **how: Any) -> Share:
    how = {"batch_size": None, "shuffle": True, "drop_last": False} | how
    return Share(data, how["batch_size"], how["shuffle"], how["drop_last"], index, workers, common or Common(workers), own)


def numbers(batch: Any) -> list[Any]:
    """A batch of numbers as a list of them."""
    batch = batch[0] if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], torch.Tensor) else batch
    return torch.as_tensor(batch).reshape(-1).tolist()


def taken(own: Share, place: Place | None = None) -> list[Taken]:
    return [(numbers(batch), items, samples) for batch, items, samples in own.batches(place or Place(EPOCH))]


def flat(found: list[Taken]) -> list[Any]:
    return [n for numbers, *_ in found for n in numbers]


def noise() -> tuple[float, float, float]:
    """What a script draws between batches."""
    return torch.rand(()).item(), random.random(), np.random.random()


def on_workers(workers: int, make: Callable[[], Any], epochs: int = 1, **how: Any) -> list[list[list[Taken]]]:
    """Each worker's epochs: the same script, whose streams differ by worker from where training begins."""
    found = []
    for index in range(workers):
        seed()
        data, common = make(), Common(workers)
        rng.diverge(index)
        found.append([])
        for epoch in range(epochs):
            found[-1].append([])
            own = share(data, index, workers, common, **how)
            for batch, items, samples in own.batches(Place(epoch)):
                found[-1][-1].append((numbers(batch), items, samples))
                noise()
    return found


def joined(shares: list[list[Taken]]) -> list[list[Any]]:
    """What the workers take in each step, in the order that one process would take it."""
    steps = []
    for step in range(max(map(len, shares))):
        parts = [numbers for own in shares for numbers, *_ in own[step : step + 1]]
        steps.append([part[at] for at in range(len(parts[0])) for part in parts if at < len(part)])
    return steps


class Numbers(Dataset):  # type: ignore[type-arg]
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return i


class Noisy(Numbers):
    """Items that the process's streams augment."""

    def __getitem__(self, i: int) -> torch.Tensor:  # type: ignore[override]
        return i + torch.rand(())


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


class LongStream(Stream):
    """A stream that knows its length is one all the same."""

    def __len__(self) -> int:
        return self.n


class Shuffled(Stream):
    """A stream that draws its order as it begins, from the process's streams or its own."""

    def __init__(self, n: int, generator: torch.Generator | None = None) -> None:
        super().__init__(n)
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.n, generator=self.generator).tolist()


class Seedling(Stream):
    """A stream whose class has the generator."""

    generator = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.n, generator=self.generator).tolist()


def seedling(n: int) -> Seedling:
    """A script's, which defines the class as it begins."""
    Seedling.generator = generator()
    return Seedling(n)


class Chance(Stream):
    """A stream that draws item by item, from all streams of the process."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.n):
            yield sum(int(x * 1e6) for x in noise())


class Own(Sampler[int]):
    """A sampler that draws from a stream of its choice, all at once as its iteration begins."""

    def __init__(self, n: int, draw: Callable[[int], list[int]]) -> None:
        self.n, self.draw = n, draw

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(self.n))

    def __len__(self) -> int:
        return self.n


class Lazy:
    """A sampler without a length that draws item by item; without an end if `n` is None."""

    def __init__(self, n: int | None, among: int = 23) -> None:
        self.n, self.among = n, among

    def __iter__(self) -> Iterator[int]:
        drawn = 0
        while self.n is None or drawn < self.n:
            drawn += 1
            yield int(sum(noise()) / 3 * self.among)


class Seeded(Sampler[list[int]]):
    """Batches of any size, from generators of the sampler's own."""

    def __init__(self, n: int, kind: str) -> None:
        self.n = n
        kinds = {
            "python": random.Random, "torch": torch.Generator().manual_seed,
            "numpy": np.random.default_rng, "legacy": np.random.RandomState,
        }  # fmt: skip
        self.own = kinds[kind](5)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        while start < self.n:
            size = self._draw()
            yield list(range(start, min(start + size, self.n)))
            start += size

    def _draw(self) -> int:
        if isinstance(self.own, random.Random):
            return self.own.randint(1, 5)
        if isinstance(self.own, torch.Generator):
            return int(torch.randint(1, 6, (), generator=self.own))
        return int(self.own.integers(1, 6) if isinstance(self.own, np.random.Generator) else self.own.randint(1, 6))


def generator(number: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def loaders(n: int, size: int = 4) -> dict[str, Callable[[], DataLoader[Any]]]:
    """A user's DataLoaders over n numbers."""
    ds = Numbers(n)

    def drawn_by(sampler: Any, **how: Any) -> DataLoader[Any]:
        return DataLoader(ds, batch_size=size, sampler=sampler, **how)

    return {
        "sequential": lambda: DataLoader(ds, batch_size=size),
        "shuffled": lambda: DataLoader(ds, batch_size=size, shuffle=True),
        "drop_last": lambda: DataLoader(ds, batch_size=size, shuffle=True, drop_last=True),
        "generator": lambda: DataLoader(ds, batch_size=size, shuffle=True, generator=generator()),
        "subset": lambda: drawn_by(SubsetRandomSampler(range(0, n, 2))),
        "weighted": lambda: drawn_by(WeightedRandomSampler([1.0] * n, n)),
        "own weighted": lambda: drawn_by(WeightedRandomSampler([1.0] * n, n, generator=generator())),
        "replacement": lambda: drawn_by(RandomSampler(ds, replacement=True, num_samples=2 * n)),
        "few": lambda: drawn_by(RandomSampler(ds, num_samples=max(1, n // 2))),
        "many": lambda: drawn_by(RandomSampler(ds, num_samples=2 * n)),
        "python": lambda: drawn_by(Own(n, lambda n: random.sample(range(n), n))),
        "numpy": lambda: drawn_by(Own(n, lambda n: np.random.permutation(n).tolist())),
        "lazy": lambda: drawn_by(Lazy(n, n)),
        "listed": lambda: drawn_by(list(range(n - 1, -1, -1))),
        "batch_sampler": lambda: DataLoader(ds, batch_sampler=BatchSampler(RandomSampler(ds), size, drop_last=False)),
        "collate": lambda: DataLoader(ds, batch_size=size, shuffle=True, collate_fn=lambda items: torch.tensor(items)),
        "noisy": lambda: DataLoader(Noisy(n), batch_size=size, shuffle=True),
    }  # fmt: skip


def by_batch(n: int) -> dict[str, Callable[[], Any]]:
    """Data of which whole batches are dealt out."""
    ds = Numbers(n)
    return {
        "own batches": lambda: DataLoader(ds, batch_sampler=[list(range(i, min(i + 3, n))) for i in range(0, n, 3)]),
        "random batches": lambda: DataLoader(ds, batch_sampler=Own(n, lambda n: [[i] for i in torch.randperm(n).tolist()])),
        **{f"{kind} batches": lambda kind=kind: DataLoader(ds, batch_sampler=Seeded(n, kind))
           for kind in ("python", "torch", "numpy", "legacy")},
        "no batches": lambda: DataLoader(ds, batch_size=None, shuffle=True),
        "lists": lambda: DataLoader(torch.arange(n), batch_size=None, sampler=BatchSampler(RandomSampler(ds), 4, False)),
        "stream": lambda: DataLoader(Stream(n), batch_size=4),
        "long stream": lambda: DataLoader(LongStream(n), batch_size=4, drop_last=True),
        "shuffled stream": lambda: DataLoader(Shuffled(n), batch_size=4),
        "own stream": lambda: DataLoader(Shuffled(n, generator()), batch_size=4),
        "class stream": lambda: DataLoader(seedling(n), batch_size=4),
        "chance stream": lambda: DataLoader(Chance(n), batch_size=4),
        "single stream": lambda: DataLoader(Shuffled(n), batch_size=None),
        "dataset": lambda: Shuffled(n),
        "list": lambda: list(torch.arange(n).split(4)),
        "tuple": lambda: tuple([i, i + 1] for i in range(n)),
        "range": lambda: range(n),
        "iterator": lambda: ([i] for i in range(n)),
        "both": lambda: Both(DataLoader(ds, batch_size=4, shuffle=True), DataLoader(ds, batch_size=4, shuffle=True)),
    }  # fmt: skip


class Both:
    """Two loaders side by side."""

    def __init__(self, *loaders: DataLoader[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return (list(batches) for batches in zip(*self.loaders, strict=True))


LOADERS, BY_BATCH = loaders(23), by_batch(23)
DATA: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": lambda: {"data": (torch.arange(23), torch.arange(23)), "batch_size": 4},
    "TensorDataset": lambda: {"data": TensorDataset(torch.arange(23)), "batch_size": 4},
    "a dataset": lambda: {"data": Numbers(23), "batch_size": 4},
    "full": lambda: {"data": Numbers(23), "batch_size": 4, "drop_last": True},
    "a subset": lambda: {"data": Subset(Numbers(50), range(23)), "batch_size": 4},
    "array": lambda: {"data": np.arange(23), "batch_size": 4},
    **{kind: lambda make=make: {"data": make()} for kind, make in (LOADERS | BY_BATCH).items()},
}
ONCE = ("iterator",)  # data that can be iterated once


# One worker


@pytest.mark.parametrize("kind", [*LOADERS, *BY_BATCH])
def test_one_worker_is_plain_pytorch_draw_by_draw(kind: str) -> None:
    make = (LOADERS | BY_BATCH)[kind]

    def run(iterate: Callable[[Any, int], Iterator[Any]]) -> list[Any]:
        seed()
        data, found = make(), []
        for epoch in range(1 if kind in ONCE else 3):
            found.append([(numbers(batch) if kind != "both" else repr(batch), noise()) for batch in iterate(data, epoch)])
            found.append(noise())
        return found

    common = Common(1)
    ours = run(lambda data, epoch: (batch for batch, *_ in share(data, common=common).batches(Place(epoch))))
    assert ours == run(lambda data, _: iter(data))
    assert ours[0]


def test_one_worker_begins_to_draw_where_pytorch_does() -> None:
    """An iterator that is asked for draws its seed then; the order is drawn with the first batch."""

    def run(iterate: Callable[[Any], Iterator[Any]]) -> list[Any]:
        seed()
        first, second = (loaders(9)["shuffled"]() for _ in range(2))
        found = [noise()]
        a, b = iterate(first), iterate(second)
        found.append(noise())
        return [*found, numbers(next(b)), noise(), numbers(next(a)), noise()]

    assert run(lambda data: (found[0] for found in share(data).batches(Place()))) == run(iter)


@pytest.mark.parametrize("kind", ["tensors", "array", "dict", "tensor", "samples", "texts", "dataset", "subset", "mixed"])
@pytest.mark.parametrize("how", [{}, {"shuffle": False}, {"drop_last": True}])
def test_data_with_a_batch_size_is_the_loader_that_a_script_would_write(kind: str, how: dict[str, bool]) -> None:
    x, y = torch.randn(11, 3, dtype=torch.float64), torch.arange(11)
    data, plain = {
        "tensors": ((x, y), TensorDataset(x, y)),
        "array": (x.numpy(), x.numpy()),
        "dict": ({"x": x, "y": y.numpy()}, [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]),
        "tensor": (x, x),
        "samples": ([*zip(x, y, strict=True)],) * 2,
        "texts": ([("a" * i, i) for i in range(11)],) * 2,
        "dataset": (Numbers(11),) * 2,
        "subset": (Subset(Subset(TensorDataset(x, y), range(1, 11)), np.array([3, 1, 7, 8])),) * 2,
        "mixed": ((x, y.numpy()), TensorDataset(x, y)),
    }[kind]
    seed()
    how = {"shuffle": True} | how
    expected = [list(DataLoader(plain, batch_size=4, **how)) for _ in range(2)]
    if not how["shuffle"] and kind not in ("dataset", "subset"):
        seed()  # a script would cut slices, and draw nothing
    after = noise()
    seed()
    found = [[batch for batch, *_ in share(data, batch_size=4, **how).batches(Place(epoch))] for epoch in range(2)]
    assert equal(found, expected)
    assert noise() == after


def equal(one: Any, other: Any) -> bool:
    """Whether two collections of tensors are the same, types and all."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# Several workers


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "noisy"])
def test_workers_together_take_what_one_process_takes_in_larger_batches(kind: str, workers: int) -> None:
    """For three epochs of a script that draws noise of its own on each worker; one process draws none here."""
    found = on_workers(workers, LOADERS[kind], epochs=3)
    seed()
    plain = loaders(23, 4 * workers)[kind]()
    expected = [[numbers(batch) for batch in plain] for _ in range(3)]
    assert [joined([own[epoch] for own in found]) for epoch in range(3)] == expected
    assert all(len(numbers) == items == samples <= 4 for own in found for epoch in own for numbers, items, samples in epoch)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in BY_BATCH if kind not in ONCE])
def test_workers_take_the_batches_of_one_process_in_turn(kind: str, workers: int) -> None:
    found = on_workers(workers, BY_BATCH[kind], epochs=3)
    seed()
    plain = BY_BATCH[kind]()
    for epoch in range(3):
        batches = [numbers(batch) for batch in plain]
        assert batches
        assert [[numbers for numbers, *_ in own[epoch]] for own in found] == [batches[k::workers] for k in range(workers)]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 60), workers=st.integers(1, 7), batch_size=st.integers(1, 9), shuffle=st.booleans(), drop=st.booleans()
)  # fmt: skip
def test_shares_are_disjoint_and_complete(n: int, workers: int, batch_size: int, shuffle: bool, drop: bool) -> None:
    how = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop}
    shares = [own[0] for own in on_workers(workers, lambda: (torch.arange(n),), **how)]
    seen = sorted(n for own in shares for n in flat(own))
    assert len(seen) == len(set(seen)) == (n // (workers * batch_size) * workers * batch_size if drop else n)
    assert all(len(batch) == batch_size for own in shares for batch, *_ in own[:-1])
    assert max(map(len, shares)) - min(map(len, shares)) <= (not drop)
    assert [len(own) for own in shares] == [
        len(share((torch.arange(n),), k, workers, **how)) for k in range(workers)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "noisy"])
def test_workers_draw_an_order_without_moving_their_own_streams(kind: str) -> None:
    own = share(LOADERS[kind](), 1, 2)
    before = rng.capture()
    assert taken(own)
    after = rng.capture()
    assert all((before[name] == after[name]).all() for name in before)


def test_noise_of_items_is_each_worker_s_own_and_worker_0_s_the_script_s() -> None:
    found = on_workers(2, lambda: DataLoader(Noisy(8), batch_size=2))
    seed()
    expected = []
    for start in (0, 4):
        expected.append([i + torch.rand(()).item() for i in (start, start + 2)])
        noise()
    assert [numbers for numbers, *_ in found[0][0]] == [torch.tensor(batch).tolist() for batch in expected]
    fractions = [{x % 1 for x in flat(own[0])} for own in found]
    assert not fractions[0] & fractions[1]


def test_drawing_an_order_leaves_the_gpu_s_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: Any) -> None:
        raise AssertionError("the GPU's stream was set")

    for name in ("manual_seed_all", "set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.cuda, name, moved)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(4, dtype=torch.uint8))
    for workers in (1, 2):
        common, resumed = Common(workers), Common(workers)
        assert taken(share(LOADERS["lazy"](), 0, workers, common))
        resumed.load_state_dict(common.state_dict())
        assert taken(share(LOADERS["lazy"](), 0, workers, resumed))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loop_that_is_broken_out_of_leaves_all_workers_at_one_point(workers: int) -> None:
    """A sampler without an end, a stream: what follows is drawn alike, and as by one process."""
    for make in (lambda w: DataLoader(Numbers(23), batch_size=4 * w, sampler=Lazy(None)), lambda w: Chance(10**9)):
        found: list[list[list[Any]]] = []
        for index in range(workers):
            seed()
            data, common = make(1), Common(workers)
            found.append([])
            for epoch in range(3):
                batches = share(data, index, workers, common).batches(Place(epoch))
                found[-1].append([numbers(next(batches)[0]) for _ in range(3)])
        seed()
        plain, size = make(workers), 3 if isinstance(data, DataLoader) else 3 * workers
        for epoch in range(3):
            batches = iter(plain)
            expected = [numbers(next(batches)) for _ in range(size)]
            shares = [[(batch, 0, 0) for batch in own[epoch]] for own in found]
            assert [n for step in joined(shares) for n in step] == [n for batch in expected for n in batch]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_generator_that_has_ended_gives_nothing_more(workers: int) -> None:
    data = ([i] for i in range(4))
    common = Common(workers)
    assert flat(taken(share(data, 0, workers, common))) == list(range(0, 4, workers))
    assert taken(share(data, 0, workers, common)) == []


def test_what_is_a_rank_s_own_is_neither_divided_nor_drawn_alike() -> None:
    seed()
    expected = [numbers(batch) for batch in LOADERS["shuffled"]()]
    seed()
    own = share(LOADERS["shuffled"](), 1, 3, own=True)
    found = []
    for batch, *_ in own.batches(Place(cuts=[[1]])):
        assert own.digest == 0
        found.append(numbers(batch))
    assert found == expected
    assert flat(taken(share([[0], [1], [2]], 1, 3, own=True))) == [0, 1, 2]


# A loader keeps its ways


class Normalised(DataLoader):  # type: ignore[type-arg]
    """A loader that changes its batches, and counts its epochs."""

    epoch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.epoch += 1
        for batch in super().__iter__():
            yield batch * 100 + self.epoch


def test_a_loader_s_own_class_is_iterated() -> None:
    given = Normalised(Numbers(7), batch_size=2)
    for epoch in (1, 2):
        assert taken(share(given, 1, 2)) == [([100 + epoch, 300 + epoch], 2, 2), ([500 + epoch], 1, 1)]
    assert given.epoch == 2


class Joined(DataLoader):  # type: ignore[type-arg]
    """A loader that gives two batches as one."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = iter(super().__iter__())
        for batch in batches:
            yield torch.cat([batch, *[more for more in [next(batches, None)] if more is not None]])


class Ahead(DataLoader):  # type: ignore[type-arg]
    """A loader that holds one batch ready."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        ready = next(batches)
        for batch in batches:
            yield {"text": str(ready)}
            ready = batch
        yield {"text": str(ready)}


def test_batches_that_a_class_joins_or_holds_ready_are_counted() -> None:
    assert [(i, s) for _, i, s in taken(share(Joined(Numbers(11), batch_size=2)))] == [(4, 4), (4, 4), (3, 3)]
    assert [found[1:] for found in share(Ahead(Numbers(5), batch_size=2)).batches(Place())] == [(2, 2), (2, 2), (1, 1)]


class Elsewhere(DataLoader):  # type: ignore[type-arg]
    """A loader whose batches do not come from its sampler."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(torch.arange(len(self.dataset)).split(2))


def test_a_class_that_passes_its_sampler_by_is_for_one_worker_alone() -> None:
    assert taken(share(Elsewhere(Numbers(5)))) == [([0, 1], 1, 2), ([2, 3], 1, 2), ([4], 1, 1)]
    assert flat(taken(share(Elsewhere(Numbers(5))), Place(taken=2))) == [4]
    assert flat(taken(share(Elsewhere(Numbers(5), num_workers=1)), Place(taken=2))) == [4]
    with pytest.raises(ValueError, match="a Elsewhere given whose batches its sampler did not draw"):
        taken(share(Elsewhere(Numbers(5)), 0, 2))


class Pid(Numbers):
    def __getitem__(self, i: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_persistent_workers_persist_and_others_end(workers: int) -> None:
    def pids(persistent: bool) -> list[set[Any]]:
        given = DataLoader(Pid(6), batch_size=1, num_workers=2, persistent_workers=persistent, shuffle=True)
        return [set(flat(taken(share(given, 0, workers), Place(epoch)))) for epoch in range(2)]

    first, second = pids(True)
    assert first == second and len(first) == 2
    first, second = pids(False)
    assert not first & second


@pytest.mark.parametrize("given", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 3}])
def test_loaders_with_workers_are_plain_pytorch_too(given: dict[str, Any]) -> None:
    def run(iterate: Callable[[Any, int], Iterator[Any]]) -> list[Any]:
        seed()
        loader = DataLoader(Noisy(9), batch_size=2, shuffle=True, **given)
        return [[(numbers(batch), noise()) for batch in iterate(loader, epoch)] for epoch in range(2)]

    ours = run(lambda data, epoch: (batch for batch, *_ in share(data).batches(Place(epoch))))
    assert ours == run(lambda data, _: iter(data))


@pytest.mark.parametrize("own", [None, 5])
def test_a_loader_s_workers_have_noise_of_their_own_on_each_rank_and_its_order_is_that_of_one_process(own: int | None) -> None:
    def make(size: int = 2) -> DataLoader[Any]:
        return DataLoader(Noisy(16), size, shuffle=True, num_workers=1, generator=None if own is None else generator(own))

    found = on_workers(2, make, epochs=2)
    seed()
    plain = make(4)
    for epoch in range(2):
        steps = joined([own[epoch] for own in found])
        expected = [numbers(batch) for batch in plain]
        assert [[int(x) for x in step] for step in steps] == [[int(x) for x in batch] for batch in expected]
        fractions = [{x % 1 for x in flat(own[epoch])} for own in found]
        assert not fractions[0] & fractions[1]


def test_a_loader_s_attributes_are_followed() -> None:
    given = DataLoader(Numbers(4), batch_size=2)
    assert flat(taken(share(given))) == [0, 1, 2, 3]
    given.collate_fn = lambda items: torch.tensor(items) + 10
    assert flat(taken(share(given))) == [10, 11, 12, 13]
    assert flat([(numbers(batch), 0, 0) for batch in given]) == [10, 11, 12, 13]


class Telling(DataLoader):  # type: ignore[type-arg]
    """A loader that looks at itself while it is iterated."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield [batch, len(self), self.collate_fn]


def test_a_class_finds_itself_as_it_was_made() -> None:
    def collate(items: list[int]) -> str:
        return str(items)

    given = Telling(LongStream(7), batch_size=2, collate_fn=collate)
    assert next(batch for batch, *_ in share(given).batches(Place())) == ["[0, 1]", 4, collate]
    given = Telling(Numbers(7), batch_size=2, collate_fn=collate)
    assert [batch for batch, *_ in share(given, 0, 2).batches(Place())] == [["[0, 2]", 2, collate], ["[4, 6]", 2, collate]]


@pytest.mark.parametrize("kind", ["shuffled", "long stream", "telling"])
def test_a_length_can_be_asked_for_in_the_middle_of_a_loop(kind: str) -> None:
    def make() -> DataLoader[Any]:
        given = Normalised(Noisy(23), batch_size=4, shuffle=True, num_workers=1)
        return given if kind == "telling" else (LOADERS | BY_BATCH)[kind]()

    found = []
    for ask in (True, False):
        seed()
        own = share(make(), 1, 2)
        batches = own.batches(Place())
        found.append([])
        for _ in range(2):
            assert not ask or len(own)
            batch, items, samples = next(batches)
            found[-1].append((numbers(batch), items, samples))
    assert found[0] == found[1]


def test_workers_that_persist_begin_anew_where_a_loop_is_resumed() -> None:
    given = DataLoader(Numbers(7), batch_size=2, num_workers=1, persistent_workers=True)
    assert flat(taken(share(given))) == list(range(7))
    assert taken(share(given), Place(taken=4)) == [([4, 5], 2, 2), ([6], 1, 1)]
    assert flat(taken(share(given))) == list(range(7))


def test_a_loader_that_was_iterated_can_be_copied_as_before() -> None:
    given = DataLoader(Numbers(4), batch_size=2, sampler=[3, 2, 1, 0])
    assert flat(taken(share(given, 0, 2))) == [3, 1]
    for other in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert flat(taken(share(other))) == [3, 2, 1, 0]
        assert flat(taken(share(given, 1, 2))) == [2, 0]
        other.collate_fn = lambda items: torch.tensor(items) + 10
        assert flat(taken(share(other))) == [13, 12, 11, 10]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_is_forgotten_with_its_workers_at_once(workers: int) -> None:
    """Left to the garbage collector, persistent workers would take ten seconds to end."""
    given = DataLoader(Pid(4), batch_size=1, num_workers=1, persistent_workers=True)
    (pid,) = {pid for epoch in range(2) for pid in flat(taken(share(given, 0, workers), Place(epoch)))}
    gc.disable()
    try:
        alive = weakref.ref(given)
        del given
        assert alive() is None
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    finally:
        gc.enable()


# Resume


class Interrupted:
    """What a checkpoint holds of a run on some workers: after some epochs, and some batches of the next."""

    def __init__(self, make: Callable[[], Any], workers: int, how: dict[str, Any]) -> None:
        self.make, self.workers, self.how = make, workers, how

    def run(self, index: int, steps: int, epochs: int = 1) -> tuple[list[Any], list[Any], list[Any], Place, Any, Any]:
        """What a worker takes in the epoch up to the checkpoint, after it, and in the epoch that follows."""
        seed()
        data, common = self.make(), Common(self.workers)
        rng.diverge(index)
        for epoch in range(epochs):
            self.take(share(data, index, self.workers, common, **self.how).batches(Place(epoch)))
        place = Place(epochs)
        batches = share(data, index, self.workers, common, **self.how).batches(place)
        before = []
        for batch, *found in itertools.islice(batches, steps):
            before.append((*found, numbers(batch), noise()))
            place.taken += found[0]
        tree, streams = common.state_dict(), rng.capture()
        after = self.take(batches)
        later = self.take(share(data, index, self.workers, common, **self.how).batches(Place(epochs + 1)))
        return before, after, later, place, tree, streams

    def resume(self, index: int, place: Place, tree: Any, streams: Any) -> tuple[list[Any], list[Any]]:
        """The same from the checkpoint on, in a process that begins anew."""
        seed()
        data, common = self.make(), Common(self.workers)
        rng.diverge(index)
        noise()
        common.load_state_dict(tree)
        batches = share(data, index, self.workers, common, **self.how).batches(place)
        rng.restore(streams)
        after = self.take(batches)
        later = self.take(share(data, index, self.workers, common, **self.how).batches(Place(place.epoch + 1)))
        return after, later

    @staticmethod
    def take(batches: Iterator[Any]) -> list[Any]:
        return [(*found, numbers(batch), noise()) for batch, *found in batches]


RESUMED = [kind for kind in DATA if kind not in ONCE]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_at_any_place_is_going_on(kind: str, workers: int) -> None:
    """Batches, what the script draws between them, and the epoch that follows."""
    how = DATA[kind]()
    how.pop("data")
    job = Interrupted(lambda: DATA[kind]()["data"], workers, how)
    for index in range(workers):
        steps = 1
        while True:
            before, after, later, place, tree, streams = job.run(index, steps)
            if len(before) < steps:
                break
            assert job.resume(index, place, tree, streams) == (after, later)
            steps += 1
        assert before and later


@pytest.mark.parametrize("kind", ["shuffled", "generator", "own weighted", "python batches", "own stream", "lazy"])
@pytest.mark.parametrize("workers", [1, 2])
def test_resuming_between_epochs_is_going_on(kind: str, workers: int) -> None:
    job = Interrupted((LOADERS | BY_BATCH)[kind], workers, {})
    for index in range(workers):
        seed()
        data, common = job.make(), Common(workers)
        rng.diverge(index)
        for epoch in range(2):
            job.take(share(data, index, workers, common).batches(Place(epoch)))
        tree, streams = common.state_dict(), rng.capture()
        later = job.take(share(data, index, workers, common).batches(Place(2)))
        seed()
        data, common = job.make(), Common(workers)
        common.load_state_dict(tree)
        rng.restore(streams)
        assert job.take(share(data, index, workers, common).batches(Place(2))) == later


@pytest.mark.parametrize("how", ["each epoch anew", "other in each epoch"])
def test_a_generator_that_the_script_sets_in_each_epoch_stays_as_it_is_set(how: str) -> None:
    def run(common: Common, epochs: range) -> list[Any]:
        found = []
        for epoch in epochs:
            own = generator(epoch if how == "other in each epoch" else 5)
            found.append(taken(share(DataLoader(Numbers(9), 2, shuffle=True, generator=own), common=common), Place(epoch)))
        return found

    whole = run(Common(1), range(4))
    common = Common(1)
    run(common, range(2))
    resumed = Common(1)
    resumed.load_state_dict(common.state_dict())
    assert run(resumed, range(2, 4)) == whole[2:]


def test_a_checkpoint_of_a_resumed_run_that_has_taken_nothing_is_that_it_came_from() -> None:
    job = Interrupted(LOADERS["own weighted"], 1, {})
    _, after, later, place, tree, streams = job.run(0, 2)
    common = Common(1)
    common.load_state_dict(tree)
    again = common.state_dict()
    assert job.resume(0, place, again, streams) == (after, later)


@pytest.mark.parametrize("shared", [False, True])
def test_each_loop_of_an_epoch_has_generators_of_its_own_or_all_share_one(shared: bool) -> None:
    def run(common: Common, loops: list[tuple[int, int]], data: list[Any], taken: int = 0) -> list[Any]:
        found = []
        for epoch, loop in loops:
            batches = share(data[loop], common=common).batches(Place(epoch, loop, taken))
            found.append([numbers(batch) for batch, *_ in batches])
            taken = 0
        return found

    def make() -> list[Any]:
        own = [generator(0)] * 2 if shared else [generator(0), generator(1)]
        return [DataLoader(Numbers(9), 2, shuffle=True, generator=own[k]) for k in range(2)]

    loops = [(epoch, loop) for epoch in range(3) for loop in range(2)]
    whole = run(Common(1), loops, make())
    common, data = Common(1), make()
    run(common, loops[:3], data)
    batches = share(data[1], common=common).batches(Place(1, 1))
    next(batches)
    tree = common.state_dict()
    resumed = Common(1)
    resumed.load_state_dict(tree)
    assert run(resumed, loops[3:], make(), 2) == [whole[3][1:], *whole[4:]]


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


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("kind", ["tensors", "weighted", "own weighted", "own batches", "python batches", "shuffled stream"])
def test_other_workers_go_on_with_what_nobody_has_taken(kind: str, first: int) -> None:
    """From one worker, whose order was drawn from the process's streams, to three that draw alike, and back."""
    how = DATA[kind]()
    how.pop("data")
    for then in (3, 1):
        job = Interrupted(lambda: DATA[kind]()["data"], first, how)
        runs = [job.run(index, 2 - index) for index in range(first)]
        cuts = [[place.taken for _, _, _, place, _, _ in runs]]
        seen = [n for before, *_ in runs for step in before for n in step[2]]
        expected = seen + [n for _, after, *_ in runs for step in after for n in step[2]]
        other = Interrupted(job.make, then, how)
        for index in range(then):
            after, _ = other.resume(index, Place(1, cuts=cuts), runs[0][4], runs[0][5])
            seen += [n for step in after for n in step[2]]
        assert sorted(seen) == sorted(expected)


EMPTY = {
    "tensors": {"data": (torch.zeros(0, 2),), "batch_size": 4},
    "dataset": {"data": Numbers(0), "batch_size": 4},
    "fewer than workers": {"data": Numbers(2), "batch_size": 4},
    "dropped": {"data": Numbers(7), "batch_size": 4, "drop_last": True},
    "no tuple": {"data": (), "batch_size": 4},
    "no samples": {"data": [], "batch_size": 4},
    "no list": {"data": []},
    "loader": {"data": DataLoader(Numbers(2), batch_size=4)},
    "no batch": {"data": iter([])},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_share_has_no_batches(kind: str) -> None:
    assert taken(share(index=2, workers=3, **EMPTY[kind])) == []


def test_places_step_through_loops_and_epochs() -> None:
    place = Place(1, 0, 7, True, [[3, 4]])
    place.next_loop()
    assert place == Place(1, 1)
    place.taken, place.over = 5, True
    place.next_epoch()
    assert place == Place(2)


# What is not data, and what is divided already


@pytest.mark.parametrize(("given", "words"), [
    ({"data": Numbers(9)}, "batch_size is missing"),
    ({"data": (torch.zeros(3),)}, "batch_size is missing"),
    ({"data": {"x": torch.zeros(3)}}, "batch_size is missing"),
    ({"data": DataLoader(Numbers(9), batch_size=2), "batch_size": 2}, "batch_size=2 given with a DataLoader"),
    ({"data": iter([[1], [2]]), "batch_size": 2}, "batch_size=2 given with an iterable of batches"),
    ({"data": LongStream(9), "batch_size": 2}, "batch_size=2 given with an iterable of batches"),
    ({"data": Numbers(9), "batch_size": 0}, "batch_size=0 given; expected a whole number, 1 or more"),
    ({"data": Numbers(9), "batch_size": -3}, "batch_size=-3 given; expected a whole number, 1 or more"),
    ({"data": Numbers(9), "batch_size": 2.0}, r"batch_size=2\.0 given; expected a whole number"),
    ({"data": Numbers(9), "batch_size": True}, "batch_size=True given; expected a whole number"),
    ({"data": 5}, "a int given as data; expected a dataset, a DataLoader, tensors or arrays, or an iterable"),
    ({"data": "train.csv"}, "a str given as data; expected a dataset"),
    ({"data": "train.csv", "batch_size": 2}, "a str given with batch_size=2; expected a dataset"),
    ({"data": {"train": Numbers(3)}, "batch_size": 2}, "a dict given with batch_size=2; expected a dataset"),
    ({"data": np.array(["a", "b"]), "batch_size": 2}, "an array of <U1 given; expected numbers"),
    ({"data": (torch.zeros(3, 2), torch.zeros(4)), "batch_size": 2}, r"shapes \[\(3, 2\), \(4,\)\] given; expected"),
    ({"data": {"x": torch.zeros(3), "y": torch.zeros(())}, "batch_size": 2}, r"shapes \[\(3,\), \(\)\] given; expected"),
    ({"data": [torch.zeros(3, 2)] * 9, "batch_size": 2}, r"a list of 9 tensors of shape \(3, 2\) given: whole samples"),
])  # fmt: skip
def test_what_is_no_data_is_an_error(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        share(**given)


def test_a_list_of_columns_is_columns() -> None:
    x, y = torch.randn(5, 2), torch.randn(5)
    (batch, *_), *rest = share([x, y.numpy()], batch_size=4, shuffle=False).batches(Place())
    assert equal(batch, [x[:4], y[:4]]) and len(rest) == 1


def accelerated(name: str, **attributes: Any) -> Any:
    """An object of a class of another library's."""
    made: Any = type(name, (), {"__module__": "accelerate.data_loader", "__iter__": lambda self: iter([[0], [1]])})()
    vars(made).update(attributes)
    return made


SPLIT: dict[str, Callable[[], DataLoader[Any]]] = {
    "DistributedSampler": lambda: DataLoader(Numbers(8), 2, sampler=DistributedSampler(Numbers(8), 2, 0)),
    "DistributedSampler ": lambda: DataLoader(Numbers(8), None, sampler=DistributedSampler(Numbers(8), 2, 0)),
    "DistributedSampler  ": lambda: DataLoader(
        Numbers(8), batch_sampler=BatchSampler(DistributedSampler(Numbers(8), 2, 0), 2, False)
    ),
    "BatchSamplerShard": lambda: DataLoader(Numbers(8), batch_sampler=accelerated("BatchSamplerShard", num_processes=2)),
    "IterableDatasetShard": lambda: DataLoader(Split(4)),
}


class Split(Stream):
    num_processes = 2


Split.__name__ = "IterableDatasetShard"


@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_that_divides_its_data_already_is_an_error(kind: str, workers: int) -> None:
    words = f"a {kind.strip()} that deals data out to 2 processes given.*leave {kind.strip()} out, or say shard=False"
    with pytest.raises(ValueError, match=words):
        share(SPLIT[kind](), 0, workers)
    assert taken(share(SPLIT[kind](), 0, workers, own=True))


def test_a_sampler_that_deals_out_to_one_process_divides_nothing() -> None:
    assert flat(taken(share(DataLoader(Numbers(4), 2, sampler=DistributedSampler(Numbers(4), 1, 0, shuffle=False))))) == [
        0,
        1,
        2,
        3,
    ]


def test_a_dispatcher_is_an_error() -> None:
    class DataLoaderDispatcher(DataLoader):  # type: ignore[type-arg]
        state = SimpleNamespace(num_processes=3)

    DataLoaderDispatcher.__module__ = "accelerate.data_loader"
    with pytest.raises(ValueError, match="a DataLoaderDispatcher that deals data out to 3 processes given"):
        share(DataLoaderDispatcher(Numbers(4)))


# Samples


@dataclass
class Pair:
    x: Any
    y: Any


COLLATED: dict[str, Callable[[Any], Any]] = {
    "zip": lambda items: tuple(zip(*items, strict=True)),
    "texts": lambda items: ["a" * n for n, _ in items],
    "time first": lambda items: torch.zeros(7, len(items)),
    "metadata first": lambda items: {"names": torch.arange(9), "x": torch.zeros(len(items), 2)},
    "dataclass": lambda items: Pair(torch.zeros(len(items), 2), 0),
    "an object": lambda items: object(),
    "padded": lambda items: torch.zeros(100),
}


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("kind", COLLATED)
def test_samples_are_the_items_that_a_loader_drew_whatever_it_makes_of_them(kind: str, in_order: bool) -> None:
    items = [(n, torch.zeros(3)) for n in range(5)]
    if in_order:
        given = [
            DataLoader(items, batch_size=3, collate_fn=COLLATED[kind]),
            DataLoader(items, batch_sampler=[[0, 1, 2], [3, 4]], collate_fn=COLLATED[kind]),
            DataLoader(Items(items), batch_size=3, collate_fn=COLLATED[kind]),
            DataLoader(Items(items), batch_size=3, collate_fn=COLLATED[kind], num_workers=1),
        ]
    else:
        given = [DataLoader(items, batch_size=3, collate_fn=COLLATED[kind], in_order=False, num_workers=1)]
    for loader in given:
        assert [samples for _, _, samples in share(loader).batches(Place())] == [3, 2]
        assert [samples for _, _, samples in share(loader, 1, 2).batches(Place())] == [2]


class Items(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Late(Numbers):
    """The first items come last."""

    def __getitem__(self, i: int) -> int:
        if i < 3:
            time.sleep(1)
        return i


def test_batches_out_of_order_are_counted_as_they_come() -> None:
    given = DataLoader(Late(5), batch_size=3, num_workers=2, in_order=False)
    assert [(numbers, samples) for numbers, _, samples in taken(share(given))] == [([3, 4], 2), ([0, 1, 2], 3)]


def test_a_dataset_that_is_asked_for_lists_of_items_gives_as_many() -> None:
    assert [samples for *_, samples in taken(share(BY_BATCH["lists"]()))] == [4] * 5 + [3]
    given = DataLoader([torch.zeros(3), torch.zeros(2)], batch_size=None)
    assert [samples for *_, samples in share(given).batches(Place())] == [3, 2]


x3, y3 = torch.zeros(3, 2), torch.zeros(3)


@pytest.mark.parametrize(("batch", "samples"), [
    (x3, 3), (x3.numpy(), 3), ([x3, y3], 3), ((x3, y3.numpy()), 3), ({"x": x3, "more": {"y": y3}}, 3), (Pair(x3, "text"), 3),
    ((0, [x3, y3]), 3), (([x3, y3], [x3, y3]), 3), (SimpleNamespace(num_graphs=4, x=x3), 4),
    (torch.nn.utils.rnn.pack_sequence([torch.zeros(5), torch.zeros(2)]), 2),
    (torch.zeros(()), None), (np.float32(1), None), ([x3, torch.zeros(2)], None), ({"x": x3, "epoch": torch.tensor(1)}, None),
    (tuple(zip((x3[0], y3[0]), (x3[1], y3[1]), strict=True)), None), (((y3, y3, y3), (y3, y3, y3)), None),
    (["a", "b"], None), ([1, 2], None), ("text", None), (object(), None), ([], None), (Pair, None),
])  # fmt: skip
def test_samples_are_told_from_a_batch_of_a_known_kind_only(batch: Any, samples: int | None) -> None:
    assert samples_in(batch) == samples
    assert [found[1:] for found in share([batch]).batches(Place())] == [(1, samples)]


# Digests


def digests(make: Callable[[int], Any], workers: int = 2, **how: Any) -> list[list[int]]:
    """The digests of each worker, step by step, as far as all have a batch; `make` may make other data on each."""
    found = []
    for index in range(workers):
        seed()
        common = Common(workers)
        rng.diverge(index)
        own = share(make(index), index, workers, common, **how)
        found.append([own.digest for _ in itertools.islice(own.batches(Place()), 40)])
    return [list(step) for step in zip(*found, strict=False)]


@pytest.mark.parametrize("kind", DATA)
def test_workers_that_draw_alike_have_the_same_digests(kind: str) -> None:
    how = DATA[kind]()
    how.pop("data")
    steps = digests(lambda _: DATA[kind]()["data"], 3, **how)
    assert steps and all(len(set(step)) == 1 and 0 < step[0] < 2**24 for step in steps)
    if kind not in ("list", "sequential"):
        assert len({step[0] for step in steps}) == len(steps)


def test_one_worker_has_nothing_to_compare() -> None:
    own = share(LOADERS["shuffled"]())
    assert {own.digest for _ in own.batches(Place())} == {0}


class Labelled(Numbers):
    def __init__(self, n: int, **labels: Any) -> None:
        super().__init__(n)
        vars(self).update(labels)


X = torch.arange(300_000)
OTHER: dict[str, Callable[[int], dict[str, Any]]] = {
    "length": lambda k: {"data": Numbers(20 + k)},
    "class": lambda k: {"data": (Numbers, Noisy)[k](20)},
    "indices": lambda k: {"data": Subset(Numbers(20), [*range(9), 9 + k])},
    "nested": lambda k: {"data": Subset(Subset(Numbers(20), [*range(9), 9 + k]), range(8, 10))},
    "joined": lambda k: {"data": ConcatDataset([Numbers(9), Subset(Numbers(20), [*range(9), 9 + k])])},
    "random_split": lambda k: {"data": random_split(Numbers(20), [10, 10])[0]},
    "dtype": lambda k: {"data": torch.zeros(20, dtype=(torch.float32, torch.int32)[k])},
    "shape": lambda k: {"data": torch.zeros(20, 1 + k)},
    "values": lambda k: {"data": TensorDataset(X + k * (X == 0), X)},
    "values of 16 bits": lambda k: {"data": TensorDataset(torch.full((20, 2), 1 + k, dtype=torch.bfloat16))},
    "tensors": lambda k: {"data": (torch.zeros(20), torch.full((20,), k))},
    "dict": lambda k: {"data": {"x": torch.full((20,), k)}},
    "order": lambda k: {"data": Subset(TensorDataset(X), [k, *range(9)])},
    "list": lambda k: {"data": [(torch.zeros(2), k)] * 20},
    "targets": lambda k: {"data": Labelled(20, targets=torch.full((20,), k))},
    "list of targets": lambda k: {"data": Labelled(20, targets=[0, k] * 10)},
    "labels": lambda k: {"data": Labelled(20, labels=np.full(20, k))},
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_data_has_another_digest(kind: str) -> None:
    """From the first step on; with orders that are the same."""
    steps = digests(lambda k: OTHER[kind](k)["data"], batch_size=2, shuffle=False)
    assert steps[0][0] != steps[0][1]
    if kind not in ("dict", "tensors"):  # of which a DataLoader makes no items
        steps = digests(lambda k: DataLoader(OTHER[kind](k)["data"], batch_size=2))
        assert steps[0][0] != steps[0][1]
    same = digests(lambda k: OTHER[kind](0)["data"], batch_size=2) if kind != "random_split" else [[0, 0]]
    assert same[0][0] == same[0][1]


STREAMS: dict[str, Callable[[int], Any]] = {
    "generator": lambda k: DataLoader(Numbers(20), 2, shuffle=True, generator=generator(k)),
    "sampler": lambda k: DataLoader(Numbers(20), 2, sampler=SubsetRandomSampler(range(20), generator=generator(k))),
    "batch sampler": lambda k: DataLoader(Numbers(20), batch_sampler=[[0, 1], [2, 3], [4, 5 + k], [6, 7]]),
    "names": lambda k: DataLoader(Named(), 2, sampler=[*"abcdefg", "hi"[k]]),
    "stream": lambda k: DataLoader(Shuffled(20, generator(k)), 2),
    "texts": lambda k: [["a"], ["b"], ["cd"[k]], ["d"]],
    "dataclasses": lambda k: [Pair(torch.zeros(2), np.full(2, i // 3 * k)) for i in range(6)],
    "arrays of objects": lambda k: [np.array(["a", i // 3 * k], dtype=object) for i in range(6)],
}


class Named(Dataset):  # type: ignore[type-arg]
    def __getitem__(self, name: str) -> int:
        return ord(name)


@pytest.mark.parametrize("kind", STREAMS)
def test_other_orders_and_streams_have_another_digest_from_where_they_differ(kind: str) -> None:
    steps = digests(STREAMS[kind])
    assert [a != b for a, b in steps][-1]
    if kind in ("batch sampler", "names"):  # lists are looked into before they are iterated
        assert steps[0][0] == steps[0][1]


def test_a_digest_is_that_of_the_batch_at_hand_where_loaders_fetch_ahead() -> None:
    plain, ahead = (
        digests(lambda k, more=more: DataLoader(Numbers(40), 2, shuffle=True, num_workers=more)) for more in (0, 1)
    )  # fmt: skip
    assert plain == ahead


# Sharded loaders


def test_a_sharded_loader_is_the_loader_but_for_its_batches() -> None:
    given = Normalised(Numbers(10), batch_size=2, num_workers=0, drop_last=True)
    given.note = "mine"  # type: ignore[attr-defined]
    calls: list[Any] = []

    def iterate(own: Any) -> Iterator[Any]:
        calls.append(own)
        return (batch for batch, *_ in share(own, 1, 2).batches(Place()))

    own: Any = sharded(given, iterate, lambda: Part(1, 2))
    assert isinstance(own, Normalised) and type(own).__name__ == "Normalised" and type(own).__module__ == __name__
    assert type(own) is type(sharded(Normalised(Numbers(3)), iterate))
    assert [numbers(batch) for batch in own] == [[101, 301], [501, 701]]
    assert [numbers(batch) for batch in own] == [[102, 302], [502, 702]]
    assert calls == [own, own]
    assert len(own) == 2 and len(given) == 5
    assert own.note == "mine" and own.dataset is given.dataset and own.batch_sampler is given.batch_sampler
    assert [numbers(batch) for batch in given][:1] == [[1, 101]]
    with pytest.raises(ValueError, match="batch_size attribute should not be set after Normalised is initialized"):
        own.batch_size = 3
    again = sharded(own, iterate, lambda: Part(0, 2))
    assert next(numbers(batch) for batch in again) == [103, 303]


def test_a_sharded_loader_s_workers_persist() -> None:
    def iterate(own: Any) -> Iterator[Any]:
        return (batch for batch, *_ in share(own, 0, 2).batches(Place()))

    own = sharded(DataLoader(Pid(8), batch_size=1, num_workers=2, persistent_workers=True), iterate, lambda: Part(0, 2))
    first, second = ({numbers(batch)[0] for batch in own} for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "lazy"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_share_knows_its_length(kind: str, workers: int) -> None:
    for index in range(workers):
        own = share(LOADERS[kind](), index, workers)
        assert len(own) == len(taken(own)) == len(sharded(LOADERS[kind](), iter, partial(Part, index, workers)))


@pytest.mark.parametrize("kind", ["own batches", "no batches", "long stream", "list", "range"])
def test_a_share_of_whole_batches_knows_its_length(kind: str) -> None:
    for index in range(3):
        own = share(BY_BATCH[kind](), index, 3)
        assert len(own) == len(taken(own))


@pytest.mark.parametrize("kind", ["lazy", "python batches", "stream", "iterator"])
def test_a_length_that_nobody_knows_is_the_error_that_it_was(kind: str) -> None:
    data = (LOADERS | BY_BATCH)[kind]()
    kinds = {"python batches": TypeError, "lazy": TypeError, "stream": TypeError, "iterator": TypeError}
    with pytest.raises(kinds[kind]):
        len(share(data, 0, 2))


# Progress bars


class Bar:
    """A progress bar, as tqdm is: it reads the iterable that it has when its iteration begins."""

    def __init__(self, iterable: Any) -> None:
        self.iterable, self.n = iterable, 0
        self.total = len(iterable) if hasattr(iterable, "__len__") else None

    def update(self, n: int) -> None:
        self.n += n

    def __iter__(self) -> Iterator[Any]:
        self.n = 0
        for thing in self.iterable:
            yield thing
            self.update(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bar_around_a_loader_shows_this_worker_s_batches(workers: int) -> None:
    given = DataLoader(Numbers(10), batch_size=2, collate_fn=str)
    bar = Bar(given)
    for _ in range(2):
        found = list(share(bar, 0, workers).batches(Place()))
        assert [found[1:] for found in found] == ([(2, 2)] * 5 if workers == 1 else [(2, 2), (2, 2), (1, 1)])
        assert bar.n == bar.total == len(found)
        assert bar.iterable is given
    batches = share(bar, 0, workers).batches(Place())
    next(batches)
    del batches
    assert bar.iterable is given


class Adapter:
    """A loader around another one that passes for it and holds one batch ready, as `accelerate` makes them."""

    def __init__(self, base: DataLoader[Any]) -> None:
        self.base_dataloader, self.iteration = base, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base_dataloader, name)

    @property
    def __class__(self) -> Any:
        return self.base_dataloader.__class__

    def __len__(self) -> int:
        return len(self.base_dataloader)

    def __iter__(self) -> Iterator[Any]:
        self.iteration += 1
        batches = iter(self.base_dataloader)
        ready = next(batches)
        for batch in batches:
            yield [ready]
            ready = batch
        yield [ready]


@pytest.mark.parametrize("stream", [False, True])
def test_a_loader_around_another_is_iterated_with_this_worker_s_batches_inside(stream: bool) -> None:
    given = Adapter(DataLoader(Stream(7) if stream else Numbers(7), batch_size=2, collate_fn=lambda items: torch.tensor(items)))
    sequel: Any = sharded(given, lambda own: (batch for batch, *_ in share(own, 1, 2).batches(Place())), lambda: Part(1, 2))
    found = [(batch[0].tolist(), samples) for batch, _, samples in share(given, 1, 2).batches(Place())]
    assert found == ([([2, 3], 2), ([6], 1)] if stream else [([1, 3], 2), ([5], 1)])
    assert given.iteration == 1
    if not stream:
        assert [batch[0].tolist() for batch in sequel] == [[1, 3], [5]] and len(sequel) == 2
    assert len(list(given)) == 4


def test_a_bar_around_a_stream_has_no_total() -> None:
    bar = Bar([i] for i in range(4))
    assert flat(taken(share(bar, 1, 2))) == [1, 3]
    assert bar.total is None


# Batches dealt out by number


def deal(
    data: Callable[[], Any], workers: int, order: list[int], turns: Callable[[int], int], **how: Any
) -> list[list[tuple[int, list[int], int]]]:
    """Each worker's (ticket, items, count), where `turns` says which of those still taking asks next."""
    left_over = iter(order)
    got: list[list[int]] = [[] for _ in range(workers)]

    def next_ticket(k: int) -> int | None:
        if (ticket := next(left_over, None)) is not None:
            got[k].append(ticket)
        return ticket

    streams = {}
    for k in range(workers):
        seed()
        own = share(data(), k, workers, **how)
        rng.diverge(k)
        streams[k] = own.dealt(EPOCH, lambda k=k: next_ticket(k))
    taken: list[list[tuple[int, list[int], int]]] = [[] for _ in range(workers)]
    while streams:
        k = list(streams)[turns(len(streams))]
        if (found := next(streams[k], None)) is None:
            del streams[k]
            continue
        batch, count, _ = found
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
    how = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop}
    data = (torch.arange(n),)
    seed()
    alone = [numbers for numbers, _, _ in taken(share(data, **how))]
    tickets = share(data, **how).tickets(EPOCH)
    assert tickets == len(alone)
    order = chance.sample(range(tickets), tickets)
    mine = deal(lambda: data, workers, order, chance.randrange, **how)
    assert all(items == alone[ticket] and len(items) == count for own in mine for ticket, items, count in own)
    assert sorted(ticket for own in mine for ticket, _, _ in own) == list(range(tickets))


DEALT = [*(kind for kind in LOADERS if kind not in ("lazy", "noisy")), "own batches", "random batches", "no batches", "lists"]


@pytest.mark.parametrize("kind", DEALT)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_ticket_names_the_same_batch_on_all_workers(kind: str, workers: int) -> None:
    make = (LOADERS | BY_BATCH)[kind]
    seed()
    alone = taken(share(make()))
    for k in range(workers):
        seed()
        own, data = Common(workers), make()
        rng.diverge(k)
        mine = share(data, k, workers, own)
        before = rng.capture()
        assert mine.tickets(EPOCH) == len(alone)
        backwards = [*reversed(range(len(alone))), None]
        got = [(numbers(batch), items, samples) for batch, items, samples in mine.dealt(EPOCH, iter(backwards).__next__)]
        assert got == alone[::-1]
        assert bool(mine.digest) == (workers > 1)
        if workers > 1:
            assert all((before[name] == state).all() for name, state in rng.capture().items())


@pytest.mark.parametrize("kind", ["shuffled", "numpy", "generator"])
def test_one_worker_that_is_dealt_all_batches_is_plain_pytorch(kind: str) -> None:
    """All but the moment: the whole order is drawn at once."""

    def make() -> DataLoader[Any]:
        given = LOADERS[kind]()
        return DataLoader(Noisy(23), batch_sampler=given.batch_sampler, generator=given.generator, num_workers=1)

    seed()
    given = make()
    expected = [[numbers(batch) for batch in given] for _ in range(2)] + [noise()]
    seed()
    given, common, found = make(), Common(1), []
    for epoch in range(2):
        own = share(given, common=common)
        tickets = iter([*range(own.tickets(epoch)), None])
        found.append([numbers(batch) for batch, *_ in own.dealt(epoch, tickets.__next__)])
    assert [*found, noise()] == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dealt_epoch_can_be_resumed(workers: int) -> None:
    def run(tree: Any, index: int) -> tuple[Any, Any]:
        seed()
        given, common = LOADERS["own weighted"](), Common(workers)
        rng.diverge(index)
        found = []
        if tree:
            common.load_state_dict(tree)
        for epoch in range(1 if tree else 0, 3):
            own = share(given, index, workers, common)
            tickets = iter([*range(own.tickets(epoch, 0)), None])
            batches = own.dealt(epoch, tickets.__next__)
            next(batches)
            tree = common.state_dict() if epoch == 1 and not tree else tree
            found.append([numbers(batch) for batch, *_ in batches])
        return found, tree

    whole, tree = run(None, 0)
    for index in range(workers):
        assert run(tree, index)[0] == whole[1:]


@pytest.mark.parametrize("kind", ["tensors", "a dataset", "collate", "no batches", "own batches", "subset"])
def test_a_ticket_is_asked_for_when_its_batch_is(kind: str) -> None:
    asked = []

    def next_ticket() -> int | None:
        asked.append(len(asked))
        return asked[-1] if asked[-1] < 3 else None

    batches = share(**DATA[kind]()).dealt(EPOCH, next_ticket)
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
    own, got = share(given), []
    for batch, count, _ in own.dealt(EPOCH, next_ticket):
        got.append((batch, count))
        ahead.append(len(asked) - len(got))
    alone = [list(range(23))[at : at + 4] for at in range(0, 23, 4)]
    assert own.tickets(EPOCH) == 6
    assert got == [(alone[ticket], len(alone[ticket])) for ticket in asked]
    assert asked == [4, 1, 0, 5, 3, 2]
    assert max(ahead) == 2


class Endless(Lazy):
    def __len__(self) -> int:
        return self.among


UNDEALT: dict[str, Callable[[], Any]] = {
    **{kind: BY_BATCH[kind] for kind in ("list", "iterator", "stream", "long stream", "dataset")},
    "no length": LOADERS["lazy"],
    "no end": lambda: DataLoader(Numbers(23), batch_size=4, sampler=Endless(None)),
}


@pytest.mark.parametrize("kind", [*UNDEALT, "own"])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_not_dealt_is_divided_as_before(kind: str, workers: int) -> None:
    seed()
    data = LOADERS["shuffled"]() if kind == "own" else UNDEALT[kind]()
    own, common = share(data, 0, workers, common := Common(workers), own=kind == "own"), common
    before, streams = common.state_dict(), rng.capture()
    assert own.tickets(EPOCH) is None
    with pytest.raises(ValueError, match="not dealt out in batches; iterate over `batches`"):
        own.dealt(EPOCH, lambda: None)
    after = common.state_dict()
    assert all((before[name] == after[name]).all() for name in before if name.startswith("now"))
    assert all((streams[name] == state).all() for name, state in rng.capture().items())
    assert next(own.batches(Place(EPOCH)))


def test_what_could_not_be_dealt_goes_on_from_a_checkpoint_all_the_same() -> None:
    def run(common: Common, epochs: range) -> list[Any]:
        given, found = BY_BATCH["torch batches"](), []
        for epoch in epochs:
            own = share(given, common=common)
            assert own.tickets(epoch) is None
            found.append(taken(own, Place(epoch)))
        return found

    whole, common, resumed = run(Common(1), range(3)), Common(1), Common(1)
    run(common, range(1))
    resumed.load_state_dict(common.state_dict())
    assert run(resumed, range(1, 3)) == whole[1:]


def test_an_order_that_could_not_be_dealt_is_as_if_it_had_not_been_drawn() -> None:
    """Of a sampler that says less than it gives."""

    class Short(Seeded):
        def __len__(self) -> int:
            return 2

    given = DataLoader(Numbers(40), batch_sampler=Short(40, "python"))
    own = share(given)
    assert own.tickets(EPOCH) is None
    plain = DataLoader(Numbers(40), batch_sampler=Short(40, "python"))
    assert [numbers for numbers, *_ in taken(own)] == [batch.tolist() for batch in plain]


@pytest.mark.parametrize("ticket", [-1, 6])
def test_a_ticket_for_no_batch_is_an_error(ticket: int) -> None:
    with pytest.raises(IndexError, match=f"ticket {ticket} given; epoch 3 has 6 batches, from 0"):
        next(share(Numbers(23), batch_size=4).dealt(EPOCH, lambda: ticket))


def test_a_sampler_of_the_user_s_own_is_drawn_once_for_a_dealt_epoch() -> None:
    drawn = []
    given = DataLoader(Numbers(9), batch_size=4, sampler=Own(9, lambda n: drawn.append(n) or list(range(n))))  # type: ignore[func-returns-value]
    own = share(given)
    assert own.tickets(EPOCH) == 3
    assert len(list(own.dealt(EPOCH, iter([0, 1, 2, None]).__next__))) == 3
    assert drawn == [9]


def first(data: Any, **how: Any) -> list[list[Any]]:
    """What a resumed run lets the body of a loop see that is done; nothing may be drawn for it."""
    own = share(data, **how)
    before = torch.get_rng_state()
    found = [numbers(batch) for batch in own.first()]
    assert torch.equal(before, torch.get_rng_state())
    return found


def test_a_first_batch_is_the_loader_s_without_a_draw() -> None:
    ten = Numbers(10)
    assert first(DataLoader(ten, batch_size=4, shuffle=True)) == [[0, 1, 2, 3]]
    assert first(DataLoader(ten, batch_size=40, num_workers=2)) == [list(range(10))]
    assert first(DataLoader(ten, batch_size=10**12)) == [list(range(10))]
    assert first(DataLoader(ten, batch_size=2, sampler=SubsetRandomSampler([7, 5, 3]))) == [[7, 5]]
    assert first(DataLoader(ten, batch_size=2, sampler=[8, 6, 4], collate_fn=lambda batch: torch.tensor(batch) + 1)) == [[9, 7]]
    assert first(DataLoader(ten, batch_size=None)) == [[0]]
    assert first(torch.arange(6), batch_size=4) == [[0, 1, 2, 3]]
    assert first([torch.tensor([1, 2]), torch.tensor([3])]) == [[1, 2]]


def test_there_is_no_first_batch_where_only_the_sampler_or_stream_knows() -> None:
    nothing: list[Any] = [DataLoader(Stream(9), batch_size=2), iter([torch.tensor([1])]), Elsewhere(Numbers(5))]
    nothing += [DataLoader(Numbers(10), batch_sampler=Seeded(10, "torch")), DataLoader(Numbers(0), batch_size=2)]
    for data in nothing:
        assert first(data) == []
