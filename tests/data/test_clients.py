"""Clients: partitions hold every item once, and who trains where with which batches follows from the numbers given alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from mpips.data import Common, Place, Share
from mpips.data.clients import Clients, chosen, hosts
from mpips.process import rng


class Numbers(Dataset):  # type: ignore[type-arg]
    def __init__(self, n: int, first: int = 0) -> None:
        self.n, self.first = n, first

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return self.first + i


def items(data: Any) -> list[int]:
    return [int(item[0] if isinstance(item, tuple) else item) for item in (data[i] for i in range(len(data)))]


def local(clients: Clients, k: int = 0, round: int = 0, epochs: int = 1, batch_size: int | None = 4, **given: Any) -> list[Any]:
    """A client's batches as (numbers, count, last)."""
    found = clients.batches(k, round, epochs, batch_size, given.pop("seed", 5), **given)
    return [((batch[0] if isinstance(batch, list) else batch).tolist(), count, last) for batch, count, last in found]


LABELS = np.repeat(np.arange(10), 60)[np.random.RandomState(0).permutation(600)]
PARTITIONS: dict[str, Callable[..., Clients]] = {
    "split": lambda data, count, **seed: Clients.split(data, count, **seed),
    "by_label": lambda data, count, **seed: Clients.by_label(data, LABELS, count, 2, **seed),
    "dirichlet": lambda data, count, **seed: Clients.dirichlet(data, LABELS, count, 0.3, **seed),
}


@pytest.mark.parametrize("data", [Numbers(600), (torch.arange(600), torch.arange(600))], ids=["dataset", "tensors"])
@pytest.mark.parametrize("kind", PARTITIONS)
@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 150), seed=st.integers(-5, 5))
def test_a_partition_holds_every_item_once(kind: str, data: Any, count: int, seed: int) -> None:
    clients = PARTITIONS[kind](data, count, seed=seed)
    assert len(clients) == len(list(clients)) == count
    assert clients.sizes == [len(client) for client in clients]
    assert sorted(i for client in clients for i in items(client)) == list(range(600))
    assert max(clients.sizes) - min(clients.sizes) <= (2 if kind == "by_label" else 1)
    assert [items(client) for client in PARTITIONS[kind](data, count, seed=seed)] == [items(client) for client in clients]


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_partition_follows_from_its_seed(kind: str) -> None:
    first, second = (items(PARTITIONS[kind](Numbers(600), 6, seed=seed)[0]) for seed in (0, 1))
    assert first != second
    assert sorted(first) != sorted(second)


def label_counts(clients: Clients) -> list[Counter[int]]:
    return [Counter(LABELS[items(client)].tolist()) for client in clients]


@pytest.mark.parametrize(("count", "each"), [(100, 2), (30, 2), (10, 3), (5, 2), (10, 1)])
def test_by_label_gives_a_client_few_labels(count: int, each: int) -> None:
    """So many shards lie within one label: 60 items of each of 10 labels."""
    clients = Clients.by_label(Numbers(600), torch.tensor(LABELS), count, each)
    assert clients.sizes == [600 // count] * count
    assert all(len(labels) <= each for labels in label_counts(clients))
    assert sum((labels for labels in label_counts(clients)), Counter()) == Counter(LABELS.tolist())


def test_by_label_deals_shards_at_random() -> None:
    """Two shards of 200 have the same label, 20 for each: a client has one label alone with chance 19/199."""
    alone = [len(c) == 1 for seed in range(5) for c in label_counts(Clients.by_label(Numbers(600), LABELS, 100, seed=seed))]
    assert 0.05 < np.mean(alone) < 0.15


@pytest.mark.parametrize(("alpha", "low", "high"), [(5e-324, 0.8, 1.0), (1e-3, 0.8, 1.0), (1.0, 0.3, 0.75), (1e6, 0.1, 0.3)])
def test_alpha_says_how_alike_clients_are(alpha: float, low: float, high: float) -> None:
    """The part of a client's items that have its commonest label."""
    clients = Clients.dirichlet(Numbers(600), LABELS, 20, alpha)
    assert clients.sizes == [30] * 20
    assert low <= np.mean([max(labels.values()) / 30 for labels in label_counts(clients)]) <= high


def test_the_first_clients_mix_has_the_moments_of_its_distribution() -> None:
    """Share of label 0, half of all items, in one client of many: mean p, variance p (1 - p) / (alpha + 1) and sampling."""
    labels, alpha, m = np.arange(800) % 2, 2.0, 40
    share = [np.mean(labels[items(Clients.dirichlet(Numbers(800), labels, 20, alpha, seed)[0])]) for seed in range(400)]
    assert abs(np.mean(share) - 0.5) < 0.06
    among = 0.25 / (alpha + 1)
    assert abs(np.var(share) / (among + (0.25 - among) / m) - 1) < 0.25


def test_indices_may_be_lists_arrays_or_tensors_and_leave_items_out() -> None:
    clients = Clients.by_index(Numbers(9), [[3, 1], np.array([8]), torch.tensor([1, 1]), []])
    assert [items(client) for client in clients] == [[3, 1], [8], [1, 1], []]
    assert clients.sizes == [2, 1, 2, 0]
    assert [items(client) for client in clients[1:3]] == [[8], [1, 1]]


def test_dealt_out_tensors_are_not_copied() -> None:
    x = torch.arange(600)
    clients = Clients.split((x,), 7)
    for data in (*clients, clients.together()):
        assert data.dataset.tensors[0].data_ptr() == x.data_ptr()


TOGETHER: dict[str, tuple[list[Any], type, list[int]]] = {
    "tensors": ([(torch.arange(3),), (torch.arange(0),), (torch.arange(3, 8),)], TensorDataset, list(range(8))),
    "datasets": ([Numbers(3), Numbers(0), Numbers(5, 3)], ConcatDataset, list(range(8))),
    "both": ([(torch.arange(3),), Numbers(5, 3)], ConcatDataset, list(range(8))),
    "two dtypes": ([(torch.arange(3),), (torch.arange(3.0),)], ConcatDataset, [0, 1, 2, 0, 1, 2]),
    "dealt out": ([*Clients.by_index(Numbers(9), [[3, 1], [], [8]])], Subset, [3, 1, 8]),
    "two wholes": ([Subset(Numbers(3), [1]), Subset(Numbers(3), [2])], ConcatDataset, [1, 2]),
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_clients_together_are_one_dataset(kind: str) -> None:
    datasets, form, expected = TOGETHER[kind]
    joined = Clients(datasets).together()
    assert type(joined) is form
    assert items(joined) == expected


OWN = Clients([(torch.arange(23),), Numbers(23), (torch.arange(0),), Numbers(0), (torch.arange(3),)])


@pytest.mark.parametrize("k", [0, 1])
@settings(deadline=None, max_examples=30)
@given(epochs=st.integers(1, 3), size=st.none() | st.integers(1, 25), shuffle=st.booleans(), drop=st.booleans())
def test_local_epochs_take_every_item_once_each(k: int, epochs: int, size: int | None, shuffle: bool, drop: bool) -> None:
    found = local(OWN, k, 3, epochs, size, shuffle=shuffle, drop_last=drop)
    full, rest = divmod(23, size or 23)
    counts = [size or 23] * full + [rest] * (rest > 0 and not drop)
    assert [count for _, count, _ in found] == [len(numbers) for numbers, _, _ in found] == counts * epochs
    assert [last for *_, last in found] == [False] * (len(found) - 1) + [True] * bool(found)
    taken = [n for numbers, _, _ in found for n in numbers]
    a_while = sum(counts)
    for epoch in range(epochs):
        mine = taken[epoch * a_while : (epoch + 1) * a_while]
        assert len(set(mine)) == a_while
        assert shuffle or mine == list(range(a_while))


@pytest.mark.parametrize("k", [2, 3])
def test_a_client_without_items_has_no_batches(k: int) -> None:
    assert local(OWN, k, batch_size=None) == local(OWN, k) == []
    assert local(OWN, 4, drop_last=True) == []


def test_each_seed_round_client_and_local_epoch_has_an_order_of_its_own() -> None:
    clients = Clients.by_index((torch.arange(40),), [range(40)] * 30)  # type: ignore[list-item]
    orders = []
    for seed, round, k in product((0, 1, 10**15), (0, 1, 11), (0, 1, 11)):
        whole = [tuple(numbers) for numbers, *_ in local(clients, k, round, 2, None, seed=seed)]
        assert local(clients, k, round, 2, None, seed=seed) == [(list(n), 40, i == 1) for i, n in enumerate(whole)]
        orders += whole
    assert len(set(orders)) == len(orders) == 54


@pytest.mark.parametrize("k", [0, 1])
def test_the_process_s_streams_have_no_say_and_are_left_alone(k: int) -> None:
    def draw(kind: str) -> list[Any]:
        clients = PARTITIONS[kind](Numbers(600), 20)
        mine = [items(client) for client in clients]
        return [
            *mine,
            chosen(3, 4, 100, 0.1),
            hosts([1, 5, 2], 2, False),
            *local(OWN, k, epochs=2),
            *local(OWN, k, batch_size=None),
        ]

    for kind in PARTITIONS:
        drawn = []
        for start in (1, 2):
            torch.manual_seed(start)
            random.seed(start)
            np.random.seed(start)
            before = rng.capture()
            drawn.append(draw(kind))
            assert all((before[name] == state).all() for name, state in rng.capture().items())
        assert drawn[0] == drawn[1]


def test_draws_are_the_same_in_every_process_and_version() -> None:
    """Ranks are processes of their own, and a run may be resumed years later: nothing like Python's `hash` has a say."""
    data = (torch.arange(9),)
    assert chosen(0, 0, 100, 0.05) == [7, 41, 71, 74, 80]
    assert items(Clients.split(data, 3)[0]) == [3, 4, 6]
    assert items(Clients.dirichlet(data, [0, 0, 0, 1, 1, 1, 2, 2, 2], 3, 1.0)[0]) == [2, 7, 6]
    assert [numbers for numbers, _, _ in local(Clients([(torch.arange(5),)]), 0, 1, 1, 3, seed=2)] == [[3, 0, 1], [2, 4]]


def test_a_client_s_batches_are_fetched_as_torch_does() -> None:
    x, y = torch.randn(30, 2), torch.arange(30)
    clients = Clients.split((x, y), 3)
    ours = [batch for batch, _, _ in clients.batches(1, 0, 1, 4, 0, shuffle=False)]
    for mine, torch_s in zip(ours, DataLoader(clients[1], batch_size=4), strict=True):
        assert type(mine) is type(torch_s) is list
        assert all(torch.equal(a, b) for a, b in zip(mine, torch_s, strict=True))


def test_a_shard_of_all_clients_together_is_fetched_by_rows() -> None:
    whole = Share(Clients.split((torch.arange(30),), 3).together(), 4, True, False, 0, 1, Common(1)).batches(Place())
    assert sorted(n for batch, _, _ in whole for n in batch[0].tolist()) == list(range(30))


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(-(2**53), 2**53), round=st.integers(0, 10**6), count=st.integers(1, 300), fraction=st.floats(0, 1))
def test_a_round_s_clients_are_different_ones_in_order(seed: int, round: int, count: int, fraction: float) -> None:
    mine = chosen(seed, round, count, fraction)
    assert mine == sorted(set(mine)) == chosen(seed, round, count, fraction)
    assert set(mine) <= set(range(count))
    expected = fraction * count
    assert len(mine) == 1 or abs(len(mine) - expected) <= 0.5
    assert fraction < 1 or mine == list(range(count))


def test_clients_are_chosen_uniformly_and_pairs_as_well() -> None:
    rounds, count, size = 3000, 10, 3
    drawn = [chosen(7, round, count, 0.3) for round in range(rounds)]
    for each, chance, bound in ((1, 0.3, 35.0), (2, 3 / 45, 90.0)):
        seen = Counter(some for mine in drawn for some in combinations(mine, each))
        expected = rounds * chance
        groups = list(combinations(range(count), each))
        assert sum((seen[group] - expected) ** 2 / expected for group in groups) < bound
    assert all(len(mine) == size for mine in drawn)
    after = Counter((a, b) for one, two in pairwise(drawn) for a in one for b in two)
    assert all(abs(after[pair] / (rounds * 0.09) - 1) < 0.35 for pair in product(range(count), repeat=2))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8), st.lists(st.integers(0, 50), min_size=1, max_size=40), st.booleans(), st.data())
def test_each_chosen_client_has_one_host(workers: int, sizes: list[int], pinned: bool, data: st.DataObject) -> None:
    some = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    hosted = hosts(some, workers, pinned, sizes)
    assert hosted == hosts(some, workers, pinned, sizes)
    assert sorted(k for mine in hosted for k in mine) == some
    assert all(mine == sorted(mine) for mine in hosted)
    if pinned:
        assert all(k % workers == worker for worker, mine in enumerate(hosted) for k in mine)
        return
    work = [sum(sizes[k] for k in mine) for mine in hosted]
    assert max(work) - min(work) <= max(sizes[k] for k in some)
    at_least = max(sum(work) / workers, max(sizes[k] for k in some))
    assert max(work) <= at_least * (2 - 1 / workers) + 1e-9
    counts = [len(mine) for mine in hosts(some, workers, False)]
    assert max(counts) - min(counts) <= 1


def test_hosts_are_balanced_by_the_work_not_the_number_of_clients() -> None:
    sizes = [100, 1, 1, 1, 1, 1, 1, 1, 1, 92]
    assert hosts(list(range(10)), 2, False, sizes) == [[0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert hosts([0, 1, 2, 3], 2, False, [0, 0, 0, 0]) == [[0, 2], [1, 3]]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


PAIR = (torch.zeros(9, 2), torch.zeros(9))
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no clients": (lambda: Clients([]), "no clients given"),
    "no indices": (lambda: Clients.by_index(Numbers(9), []), "no clients given"),
    "one dataset": (lambda: Clients(PAIR), "a tuple of tensors given, which is one dataset"),
    "a stream": (lambda: Clients([Numbers(9), Stream()]), "client 1: a Stream given; expected a map-style dataset"),
    "a loader": (lambda: Clients.split(DataLoader(Numbers(9)), 2), "a DataLoader given; expected a map-style dataset"),
    "lengths": (lambda: Clients([(torch.zeros(3), torch.zeros(2))]), "expected the same first dimension"),
    "count": (lambda: Clients.split(PAIR, 0), "count=0 given; expected a whole number, 1 or more"),
    "half": (lambda: Clients.split(PAIR, 2.5), r"count=2\.5 given; expected a whole number"),  # type: ignore[arg-type]
    "no items": (lambda: Clients.split(Numbers(0), 2), "data without items given"),
    "no items, labels": (lambda: Clients.by_label(Numbers(0), [], 2), "data without items given"),
    "no items, alpha": (lambda: Clients.dirichlet(Numbers(0), [], 2, 1.0), "data without items given"),
    "index": (lambda: Clients.by_index(PAIR, [[1], [9]]), "client 1: item 9 given; the data has 9, from 0"),
    "negative": (lambda: Clients.by_index(PAIR, [[-1]]), "client 0: item -1 given"),
    "mask": (lambda: Clients.by_index(PAIR, [torch.ones(9).bool()]), r"client 0: bool of shape \(9,\) given"),
    "labels": (lambda: Clients.by_label(PAIR, [1, 2], 2), r"labels of shape \(2,\) given; expected one for each of 9 items"),
    "shards": (lambda: Clients.by_label(PAIR, [1] * 9, 5), "5 clients with 2 shards each given; the data has 9 items only"),
    "each": (lambda: Clients.by_label(PAIR, [1] * 9, 5, 0), "shards_each=0 given"),
    "alpha": (lambda: Clients.dirichlet(PAIR, [1] * 9, 5, 0.0), r"alpha=0\.0 given; expected a number above 0"),
    "nan": (lambda: Clients.dirichlet(PAIR, [1] * 9, 5, float("nan")), "alpha=nan given"),
    "client": (lambda: OWN.batches(5, 0, 1, 4, 0), "client 5 asked for; there are 5, from 0"),
    "below": (lambda: OWN[-1], "client -1 asked for; there are 5, from 0"),
    "epochs": (lambda: OWN.batches(0, 0, 0, 4, 0), "epochs=0 given"),
    "batch_size": (lambda: OWN.batches(0, 0, 1, 0, 0), "batch_size=0 given; expected a whole number, 1 or more"),
    "none": (lambda: chosen(0, 0, 0, 1.0), "count=0 given"),
    "fraction": (lambda: chosen(0, 0, 9, 1.1), r"fraction=1\.1 given; expected a number from 0 to 1"),
    "workers": (lambda: hosts([1], 0, False), "workers=0 given"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_is_one_clear_line(kind: str) -> None:
    call, words = WRONG[kind]
    with pytest.raises((ValueError, IndexError), match=words) as error:
        call()
    assert "\n" not in str(error.value)
