"""Pinned buffers between a device and MPI, with a device that does everything as late as it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mpips.comm.staging import Staging


class Late:
    """Copies that are made only when somebody waits for one: then those before it, too, in their order.

    Attributes:
        queue: not made yet.
        log: what was queued, and what came between.
    """

    def __init__(self, _: torch.device) -> None:
        self.queue: list[Callable[[], object]] = []
        self.log: list[str] = []
        self.buffers: list[Tensor] = []

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.buffers.append(torch.full((numel,), -1, dtype=dtype))
        return self.buffers[-1]

    def follow(self) -> None:
        self.log.append("follow")

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        inside = any(target.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in self.buffers)
        self.log.append("fetch" if inside else "back")

        def make() -> None:
            target.copy_(source)

        self.queue.append(make)

        def wait() -> None:
            while make in self.queue:
                self.queue.pop(0)()

        return wait

    def lead(self) -> None:
        self.log.append("lead")
        while self.queue:
            self.queue.pop(0)()


class Staged(Staging):
    """Everything is on a device."""

    def __init__(self) -> None:
        super().__init__(False, self.make)

    def make(self, device: torch.device) -> Late:
        self.late = Late(device)
        return self.late

    def needed(self, tensor: Tensor) -> bool:
        return True


def parts(count: int, length: int = 4) -> list[Tensor]:
    whole = torch.arange(float(count * length))
    return list(whole.split(length)) if count else []


def taken(staging: Staged, given: list[Tensor], **how: bool) -> Iterator[Tensor]:
    for buffer in staging.through(given, **how):
        staging.late.log.append("mpi")
        yield buffer


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_mpi_reads_every_part(count: int) -> None:
    staging, given = Staged(), parts(count)
    assert [b.tolist() for b in staging.through(given, read=True, written=False)] == [p.tolist() for p in given]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("read", [True, False])
def test_what_mpi_writes_arrives(count: int, read: bool) -> None:
    staging, given = Staged(), parts(count)
    before = [p.clone() for p in given]
    for again in (1, 2):
        for number, buffer in enumerate(staging.through(given, read=read, written=True)):
            assert not read or torch.equal(buffer, before[number] + (again - 1) * 100)
            buffer.copy_(before[number] + again * 100)
        assert all(torch.equal(p, b + again * 100) for p, b in zip(given, before, strict=True)), "after `lead`"


def test_the_last_part_may_be_shorter_and_buffers_grow_and_are_kept() -> None:
    staging = Staged()
    for length in (3, 5, 5, 2):
        given = [torch.ones(length), torch.full((length,), 2.0), torch.full((1,), 3.0)]
        found = [b.tolist() for b in staging.through(given, read=True, written=False)]
        assert found == [p.tolist() for p in given]
    assert [len(b) for b in staging.late.buffers] == [3, 3, 5, 5]


def test_the_next_part_is_fetched_and_the_last_put_back_while_mpi_has_one() -> None:
    staging = Staged()
    for _ in taken(staging, parts(4), read=True, written=True):
        pass
    expected = "follow fetch fetch mpi back fetch mpi back fetch mpi back mpi back lead"
    assert staging.late.log == expected.split()


def test_a_buffer_that_is_not_waited_for_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    staging, given = Staged(), parts(3)

    def copy(late: Late, target: Tensor, source: Tensor) -> Callable[[], None]:
        late.queue.append(lambda: target.copy_(source))
        return lambda: None

    monkeypatch.setattr(Late, "copy", copy)
    assert [b.tolist() for b in staging.through(given, read=True, written=False)] != [p.tolist() for p in given]


@pytest.mark.parametrize("read", [True, False])
def test_a_whole_message(read: bool) -> None:
    staging, message = Staged(), torch.arange(5.0)
    for again in range(3):
        expected = message.clone()
        buffer = staging.host(message, read)
        assert not read or torch.equal(buffer, expected)
        buffer.copy_(expected * 2 + again)
        staging.back(buffer[2:], message[2:])
        assert torch.equal(message, torch.cat([expected[:2], expected[2:] * 2 + again]))


def test_host_tensors_are_given_as_they_are() -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError("copies of a host tensor")

    staging, given = Staging(False, refuse), parts(3)
    assert all(a is b for a, b in zip(staging.through(given, read=True, written=True), given, strict=True))
    assert staging.host(given[0], True) is given[0]
