"""Random streams go on exactly where they were, and each worker has its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mpips import checkpoint
from mpips.process import rng


@pytest.fixture(autouse=True)
def _streams() -> Iterator[None]:
    kept = rng.capture()
    yield
    rng.restore(kept)


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def draws() -> list[float]:
    """Numbers of every kind of every stream; the normal ones keep a second number back."""
    return [
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(()).item(),
        torch.randn(()).item(), float(torch.randperm(1000)[0]),
    ]  # fmt: skip


@pytest.mark.parametrize("before", range(5))
@pytest.mark.parametrize("filed", [False, True])
def test_a_restored_stream_goes_on_as_the_first_time(before: int, filed: bool) -> None:
    seed(3)
    for _ in range(before):
        draws()
    state = rng.capture()
    if filed:
        state = checkpoint.load(checkpoint.save(Path(), 1, {"streams": state}))["streams"]
    first = [draws() for _ in range(3)]
    seed(4)
    draws()
    rng.restore(state)
    assert [draws() for _ in range(3)] == first


def test_the_numbers_kept_back_are_kept() -> None:
    seed(5)
    random.gauss(0, 1)
    np.random.normal()
    state = rng.capture()
    expected = random.gauss(0, 1), np.random.normal()
    seed(6)
    rng.restore(state)
    assert (random.gauss(0, 1), np.random.normal()) == expected


def test_a_captured_state_does_not_go_on_with_the_stream() -> None:
    seed(7)
    state = rng.capture()
    copy = {name: value.copy() for name, value in state.items()}
    draws()
    assert all((state[name] == copy[name]).all() for name in copy)
    assert all(value.dtype != object for value in state.values())


@pytest.mark.parametrize("index", [0, -1])
def test_the_first_worker_and_the_server(index: int) -> None:
    """Worker 0 keeps the script's streams: one worker is then plain PyTorch, also with dropout."""
    seed(8)
    expected = draws()
    seed(8)
    rng.diverge(index)
    assert (draws() == expected) == (index == 0)


def test_workers_have_different_streams_that_the_script_s_seed_decides() -> None:
    seen = []
    for script in (1, 2, 1):
        for index in range(4):
            seed(script)
            rng.diverge(index)
            seen.append(tuple(draws()))
    assert len(set(seen)) == 8
    assert seen[8:] == seen[:4]


@pytest.mark.parametrize("script", [0, 2**63 - 1, -1])
def test_any_seed_will_do(script: int) -> None:
    torch.manual_seed(script)
    rng.diverge(10**6)
