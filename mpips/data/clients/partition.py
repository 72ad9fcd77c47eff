"""Partitions: for each client the indices of its items. Every item belongs to exactly one client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mpips.data.clients.draw import counted, permutation, seed_of


def iid(n: int, count: int, seed: int) -> list[np.ndarray]:
    """Return a random order of the n items, cut into `count` shares."""
    return _cut(permutation(_filled(n), "split", seed), counted("count", count))


def by_label(n: int, labels: Any, count: int, shards_each: int, seed: int) -> list[np.ndarray]:
    """Return the partition of `Clients.by_label`."""
    number = counted("count", count) * counted("shards_each", shards_each)
    if number > _filled(n):
        raise ValueError(f"{count} clients with {shards_each} shards each given; the data has {n} items only")
    shards = _cut(np.argsort(_labels(labels, n), kind="stable"), number)
    drawn = permutation(number, "label", seed).reshape(count, shards_each)
    return [np.concatenate([shards[i] for i in own_shards]) for own_shards in drawn]


def dirichlet(n: int, labels: Any, count: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Return the partition of `Clients.dirichlet`."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha!r} given; expected a number above 0")
    shares = [len(share) for share in _cut(np.arange(_filled(n)), counted("count", count))]
    stream = np.random.RandomState(seed_of("dirichlet", seed) % 2**32)  # the same draws in all versions of numpy
    label = np.unique(_labels(labels, n), return_inverse=True)[1]
    has, order = np.bincount(label), stream.permutation(n)
    pools = np.split(order[np.argsort(label[order], kind="stable")], np.cumsum(has)[:-1])
    taken = np.zeros_like(has)
    indices = []
    for counts in _mixes(stream, has, shares, max(alpha, 1e-100)):
        indices.append(np.concatenate([pool[at : at + m] for pool, at, m in zip(pools, taken, counts, strict=True)]))
        taken += counts
    return indices


def _mixes(stream: np.random.RandomState, left: np.ndarray, shares: list[int], alpha: float) -> Iterator[np.ndarray]:
    """Yield how many items of each label the next client takes."""
    left = left.copy()
    prior = alpha * left / left.sum()
    for share in shares:
        # Logarithms of gamma variates, as the variates underflow for small alpha; their softmax is Dirichlet distributed.
        logs = np.log(stream.standard_gamma(prior + 1)) + np.log1p(-stream.random_sample(len(prior))) / prior
        counts = np.zeros_like(left)
        while counts.sum() < share:
            open_logs = np.where(left > counts, logs, -np.inf)
            mix = np.exp(open_logs - open_logs.max())
            counts = np.minimum(counts + stream.multinomial(share - counts.sum(), mix / mix.sum()), left)
        left -= counts
        yield counts


def _filled(n: int) -> int:
    """Return n; raise ValueError if it is 0."""
    if not n:
        raise ValueError("data without items given; there is nothing to deal out")
    return n


def _labels(labels: Any, n: int) -> np.ndarray:
    """Return the labels as an array; raise ValueError unless there is one for each of n items."""
    given = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if given.shape != (n,):
        raise ValueError(f"labels of shape {given.shape} given; expected one for each of {n} items")
    return given


def _cut(items: np.ndarray, parts: int) -> list[np.ndarray]:
    """Return the items cut into consecutive parts whose sizes differ by at most one."""
    return [items[i * len(items) // parts : (i + 1) * len(items) // parts] for i in range(parts)]
