"""What every exchange must do: a class of tests that each implementation inherits.

An implementation supplies `run(program, size)`: run `program(exchange)` on every rank, return the results by rank on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mpips.exchange import SERVER, Exchange, share

Program = Callable[[Exchange], Any]


class ExchangeContract:
    sizes: tuple[int, ...] = ()

    run: Callable[[Any, Program, int], list[Any]]

    @pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    def test_ranks_and_size(self, size: int) -> None:
        assert self.run(lambda e: (e.rank, e.size), size) == [(r, size) for r in range(size)]

    @pytest.mark.parametrize("numel", [1, 7, 1000, 300_000])
    def test_sum_arrives_at_the_server_once(self, size: int, numel: int, dtype: torch.dtype) -> None:
        def program(e: Exchange) -> Any:
            message = e.allocate(numel + 3, dtype, torch.device("cpu"))
            message.copy_(torch.arange(numel + 3) % 100 * (e.rank + 1))
            got: list[Tensor] = []
            e.combine(message, numel, "sum", lambda part, rows: got.append(rows.clone()))
            return got, message[numel:].clone()

        results = self.run(program, size)
        factor = size * (size + 1) // 2
        (combined,), tail = results[SERVER]
        assert combined.shape == (1, numel)
        assert torch.equal(combined[0], torch.arange(numel).to(dtype) % 100 * factor)
        assert torch.equal(tail, torch.arange(numel, numel + 3).to(dtype) % 100 * factor)
        assert all(got == [] for got, _ in results[1:])

    @pytest.mark.parametrize("numel", [1, 1000, 300_000])
    def test_rows_arrive_in_rank_order_slice_by_slice(self, size: int, numel: int, dtype: torch.dtype) -> None:
        def program(e: Exchange) -> Any:
            message = torch.arange(numel + 2, dtype=dtype) + 1000 * e.rank
            parts: list[tuple[slice, Tensor]] = []
            e.combine(message, numel, "rows", lambda part, rows: parts.append((part, rows.clone())))
            return parts, message[numel:].clone()

        results = self.run(program, size)
        parts, tail = results[SERVER]
        assert [part.start for part, _ in parts] == [0, *(part.stop for part, _ in parts[:-1])]
        assert parts[-1][0].stop == numel
        rows = torch.cat([rows for _, rows in parts], dim=1)
        assert torch.equal(rows, torch.stack([torch.arange(numel, dtype=dtype) + 1000 * r for r in range(size)]))
        assert torch.equal(tail, sum(torch.arange(numel, numel + 2, dtype=dtype) + 1000 * r for r in range(size)))
        assert numel < 100_000 or len(parts) > 1, "a large message must come bucket by bucket"
        assert all(got == [] for got, _ in results[1:])

    def test_the_tail_is_there_before_apply(self, size: int) -> None:
        def program(e: Exchange) -> Any:
            seen: list[float] = []
            for needs in ("sum", "rows"):
                message = torch.ones(10)
                e.combine(message, 8, needs, lambda part, rows, message=message: seen.append(float(message[9])))
            return seen

        assert self.run(program, size)[SERVER] == [size, size]

    @pytest.mark.parametrize("dtype_", [torch.uint8, torch.bfloat16, torch.float16, torch.int64, torch.bool])
    def test_publish_moves_any_dtype(self, size: int, dtype_: torch.dtype) -> None:
        content = (torch.arange(1000) % 2).to(dtype_)

        def program(e: Exchange) -> Tensor:
            message = content.clone() if e.rank == SERVER else torch.zeros(1000, dtype=dtype_)
            e.publish(message)
            return message

        assert all(torch.equal(got, content) for got in self.run(program, size))

    def test_nothing_to_move_is_no_error(self, size: int) -> None:
        def program(e: Exchange) -> bool:
            e.publish(torch.zeros(0))
            e.combine(torch.ones(2), 0, "sum", lambda part, rows: None)
            e.combine(torch.ones(2), 0, "rows", lambda part, rows: None)
            return share(e, b"") == b""

        assert all(self.run(program, size))

    def test_collect_brings_blobs_of_any_length(self, size: int) -> None:
        results = self.run(lambda e: e.collect(bytes([e.rank]) * (e.rank * 70_001)), size)
        assert results[SERVER] == [bytes([r]) * (r * 70_001) for r in range(size)]
        assert results[1:] == [[]] * (size - 1)

    def test_share_and_compare(self, size: int) -> None:
        assert self.run(lambda e: share(e, b"the server's" if e.rank == SERVER else b"x"), size) == [b"the server's"] * size
        digests = [bytes([r]) * 32 for r in range(size)]
        assert self.run(lambda e: e.compare(bytes([e.rank]) * 32), size) == [digests] * size

    def test_traffic_counts_calls_and_bytes(self, size: int) -> None:
        def program(e: Exchange) -> dict[str, int]:
            e.combine(torch.ones(1000), 990, "sum", lambda part, rows: None)
            e.publish(torch.ones(500))
            return dict(e.traffic)

        expected = {"combine calls": 1, "combine bytes": 4000, "publish calls": 1, "publish bytes": 2000}
        assert self.run(program, size) == [expected] * size

    def test_the_clock_does_not_go_back(self, size: int) -> None:
        def program(e: Exchange) -> bool:
            before = e.clock()
            e.publish(torch.zeros(1))
            return e.clock() >= before

        assert all(self.run(program, size))
