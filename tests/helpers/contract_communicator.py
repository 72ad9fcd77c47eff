"""What every communicator must do: a class of tests that each implementation inherits.

An implementation supplies `run(program, size)`: run `program(communicator)` on every rank, return the results by rank on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mpips.comm import SERVER, Communicator, CommunicatorError, broadcast_bytes

Program = Callable[[Communicator], Any]


class CommunicatorContract:
    sizes: tuple[int, ...] = ()

    run: Callable[[Any, Program, int], list[Any]]

    @pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    def test_ranks_and_size(self, size: int) -> None:
        assert self.run(lambda e: (e.rank, e.size), size) == [(r, size) for r in range(size)]

    @pytest.mark.parametrize("numel", [1, 7, 1000, 300_000])
    def test_sum_arrives_at_the_server_once(self, size: int, numel: int, dtype: torch.dtype) -> None:
        def program(e: Communicator) -> Any:
            message = e.allocate(numel + 3, dtype, torch.device("cpu"))
            message.copy_(torch.arange(numel + 3) % 100 * (e.rank + 1))
            got: list[Tensor] = []
            e.reduce(message, numel, "sum", lambda part, rows: got.append(rows.clone()))
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
        def program(e: Communicator) -> Any:
            message = torch.arange(numel + 2, dtype=dtype) + 1000 * e.rank
            parts: list[tuple[slice, Tensor]] = []
            e.reduce(message, numel, "rows", lambda part, rows: parts.append((part, rows.clone())))
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
        def program(e: Communicator) -> Any:
            seen: list[float] = []
            for needs in ("sum", "rows"):
                message = torch.ones(10)
                e.reduce(message, 8, needs, lambda part, rows, message=message: seen.append(float(message[9])))
            return seen

        assert self.run(program, size)[SERVER] == [size, size]

    @pytest.mark.parametrize("dtype_", [torch.uint8, torch.bfloat16, torch.float16, torch.int64, torch.bool])
    def test_publish_moves_any_dtype(self, size: int, dtype_: torch.dtype) -> None:
        content = (torch.arange(1000) % 2).to(dtype_)

        def program(e: Communicator) -> Tensor:
            message = content.clone() if e.rank == SERVER else torch.zeros(1000, dtype=dtype_)
            e.broadcast(message)
            return message

        assert all(torch.equal(got, content) for got in self.run(program, size))

    def test_nothing_to_move_is_no_error(self, size: int) -> None:
        def program(e: Communicator) -> bool:
            e.broadcast(torch.zeros(0))
            e.reduce(torch.ones(2), 0, "sum", lambda part, rows: None)
            e.reduce(torch.ones(2), 0, "rows", lambda part, rows: None)
            return broadcast_bytes(e, b"") == b""

        assert all(self.run(program, size))

    def test_collect_brings_blobs_of_any_length(self, size: int) -> None:
        results = self.run(lambda e: e.gather_bytes(bytes([e.rank]) * (e.rank * 70_001)), size)
        assert results[SERVER] == [bytes([r]) * (r * 70_001) for r in range(size)]
        assert results[1:] == [[]] * (size - 1)

    def test_share_and_compare(self, size: int) -> None:
        assert (
            self.run(lambda e: broadcast_bytes(e, b"the server's" if e.rank == SERVER else b"x"), size)
            == [b"the server's"] * size
        )
        digests = [bytes([r]) * 32 for r in range(size)]
        assert self.run(lambda e: e.allgather_digests(bytes([e.rank]) * 32), size) == [digests] * size

    def test_traffic_counts_calls_and_bytes(self, size: int) -> None:
        def program(e: Communicator) -> dict[str, int]:
            e.reduce(torch.ones(1000), 990, "sum", lambda part, rows: None)
            e.broadcast(torch.ones(500))
            return dict(e.traffic)

        expected = {"reduce calls": 1, "reduce bytes": 4000, "broadcast calls": 1, "broadcast bytes": 2000}
        assert self.run(program, size) == [expected] * size

    def test_the_clock_does_not_go_back(self, size: int) -> None:
        def program(e: Communicator) -> bool:
            before = e.clock()
            e.broadcast(torch.zeros(1))
            return e.clock() >= before

        assert all(self.run(program, size))


def serve(e: Communicator, numel: int, count: int, tail: int = 0) -> list[tuple[int, bool, Tensor]]:
    """Answer `count` requests with the request itself, negated; what came, in order."""
    came = []
    for _ in range(count):
        message = torch.full((numel,), -7.0)
        rank, whole = e.next_request(message, tail)
        came.append((rank, whole, message))
        e.respond(rank, -message)
    return came


class RequestsContract:
    sizes: tuple[int, ...] = ()

    run: Callable[[Any, Program, int], list[Any]]

    @pytest.fixture(params=[False, True], ids=["plain", "overlap"])
    def overlap(self, request: pytest.FixtureRequest) -> bool:
        return request.param

    @pytest.mark.parametrize("numel", [1, 2, 1000, 20_000, 300_000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
    def test_bytes_arrive_both_ways(self, size: int, numel: int, dtype: torch.dtype, overlap: bool) -> None:
        def content(rank: int) -> Tensor:
            return ((torch.arange(numel) * 7 + rank) % 251).to(dtype)

        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                seen: dict[int, Tensor] = {}
                for _ in range(e.size - 1):
                    message = torch.zeros(numel, dtype=dtype)
                    rank, whole = e.next_request(message, 0)
                    assert whole
                    seen[rank] = message
                    e.respond(rank, message.flip(0).contiguous().view(torch.uint8))  # of another dtype
                return seen
            answer = torch.zeros(numel, dtype=dtype)
            assert e.request(content(e.rank), answer, 1, overlap)()
            return answer

        seen, *answers = self.run(program, size)
        assert sorted(seen) == list(range(1, size))
        for rank, answer in enumerate(answers, start=1):
            assert torch.equal(seen[rank], content(rank))
            assert torch.equal(answer, content(rank).flip(0))

    @pytest.mark.parametrize("numel", [10, 100_000])
    @pytest.mark.parametrize("whole", [False, True])
    def test_an_end_and_a_short_answer_are_told_from_whole_ones(
        self, size: int, numel: int, whole: bool, overlap: bool
    ) -> None:
        tail, short = numel // 2 + 1, numel // 4

        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                came = []
                for _ in range(2 * (e.size - 1)):
                    message = torch.full((numel,), -7.0)
                    came.append((*e.next_request(message, tail), message))
                    e.respond(came[-1][0], torch.ones(numel if came[-1][1] != whole else short))
                return came
            request, said = torch.arange(numel) + 1000.0 * e.rank, []
            for start in (0, tail):
                answer = torch.zeros(numel)
                said.append(
                    (e.request(request[start:], answer, short, overlap)(), int(answer.sum()), int(answer[:short].sum()))
                )
            return said

        came, *answers = self.run(program, size)
        for rank, is_whole, message in came:
            assert torch.equal(message[tail:], torch.arange(numel)[tail:] + 1000.0 * rank)
            assert torch.equal(
                message[:tail], torch.arange(numel)[:tail] + 1000.0 * rank if is_whole else torch.full((tail,), -7.0)
            )
        for rank, said in enumerate(answers, start=1):
            assert [is_whole for r, is_whole, _ in came if r == rank] == [True, False]
            full, brief = (True, numel, short), (False, short, short)
            assert said == ([brief, full] if whole else [full, brief])

    def test_many_ranks_ask_whenever_they_like(self, size: int, overlap: bool) -> None:
        turns = 30

        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                return serve(e, 500, turns * (e.size - 1), tail=499)
            lengths = [500 if (e.rank * 7 + turn * turn) % 3 else 1 for turn in range(turns)]
            got = []
            for turn, length in enumerate(lengths):
                answer = torch.zeros(500)
                assert e.request(torch.full((length,), 100.0 * e.rank + turn), answer, 1, overlap)()
                got.append((float(answer[499]), length == 500))
            return got

        came, *got = self.run(program, size)
        for rank, answers in enumerate(got, start=1):
            mine = [(-float(message[499]), whole) for r, whole, message in came if r == rank]
            assert answers == mine
            assert [-value for value, _ in mine] == [100.0 * rank + turn for turn in range(turns)]

    @pytest.mark.parametrize("numel", [5, 50_000])
    def test_requests_are_held_and_answered_in_any_order(self, size: int, numel: int, overlap: bool) -> None:
        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                held = [
                    e.next_request(torch.zeros(numel), 0)[0] for _ in range(e.size - 1)
                ]  # the first until all others are through
                for rank in reversed(held[1:]):
                    e.respond(rank, torch.full((numel,), float(rank)))
                again = [rank for rank, _, _ in serve(e, numel, e.size - 2)]
                e.respond(held[0], torch.full((numel,), -float(held[0])))
                return held, again
            answer, second = torch.zeros(numel), torch.zeros(numel)
            e.request(torch.ones(numel), answer, 1, overlap)()
            if answer[0] > 0:  # not the held one
                e.request(torch.ones(numel), second, 1, overlap)()
            return float(answer[-1]), float(second[-1])

        (held, again), *answers = self.run(program, size)
        assert sorted(held) == list(range(1, size))
        assert sorted(again) == sorted(held[1:])
        for rank, got in enumerate(answers, start=1):
            assert got == ((-rank, 0) if rank == held[0] else (rank, -1))

    @pytest.mark.parametrize("numel", [5, 300_000])
    def test_the_answers_memory_may_be_changed_at_once(self, size: int, numel: int, overlap: bool) -> None:
        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                weights = torch.zeros(numel)
                for _ in range(3 * (e.size - 1)):
                    rank, _ = e.next_request(torch.zeros(1), 0)
                    weights.fill_(float(rank))
                    e.respond(rank, weights)
                    weights.fill_(-1)
                return True
            answer = torch.zeros(numel)
            return all(e.request(torch.zeros(1), answer, 1, overlap)() and bool((answer == e.rank).all()) for _ in range(3))

        assert all(self.run(program, size))

    @pytest.mark.parametrize("numel", [5, 300_000])
    def test_a_rank_may_compute_before_it_takes_the_answer(self, size: int, numel: int, overlap: bool) -> None:
        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                return len(serve(e, numel, 2 * (e.size - 1)))
            request = torch.zeros(numel)
            for turn in range(2):
                answer = torch.zeros(numel)
                request.fill_(turn + 1)
                finish = e.request(request, answer, 1, overlap)
                computed = torch.ones(100, 100)
                for _ in range(20):
                    computed = computed @ torch.eye(100)
                assert finish()
                assert bool((answer == -(turn + 1)).all())
                assert bool((computed == 1).all())
            return 2

        assert self.run(program, size) == [2 * (size - 1)] + [2] * (size - 1)

    def test_requests_and_collective_calls_do_not_mix(self, size: int, overlap: bool) -> None:
        def program(e: Communicator) -> Any:
            told = torch.zeros(4)
            said = []
            for turn in range(3):
                e.broadcast(told.fill_(turn) if e.rank == SERVER else told)
                if e.rank == SERVER:  # a rank that is through goes on to collect while others still ask
                    serve(e, 4, (e.size - 1) * e.size // 2)
                else:
                    for _ in range(e.rank):
                        answer = torch.zeros(4)
                        e.request(told + e.rank, answer, 1, overlap)()
                        said.append(float(answer[0]) == -(turn + e.rank))
                blobs = e.gather_bytes(bytes([e.rank, turn]))
                assert blobs == ([bytes([r, turn]) for r in range(e.size)] if e.rank == SERVER else [])
                e.reduce(torch.ones(3), 2, "rows", lambda part, rows: said.append(rows.shape == (e.size, 2)))
            return said

        results = self.run(program, size)
        assert results[SERVER] == [True] * 3
        assert results[1:] == [[True] * 3 * rank for rank in range(1, size)]

    def test_one_request_at_a_time(self, size: int) -> None:
        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                return len(serve(e, 4, e.size - 1))
            finish = e.request(torch.zeros(4), torch.zeros(4), 1)
            with pytest.raises(CommunicatorError, match=f"rank {e.rank} .* before it has taken the answer"):
                e.request(torch.zeros(4), torch.zeros(4), 1)
            return finish()

        assert self.run(program, size) == [size - 1] + [True] * (size - 1)

    def test_an_answer_of_another_length_is_refused(self, size: int, overlap: bool) -> None:
        def program(e: Communicator) -> Any:
            if e.rank == SERVER:
                return len(serve(e, 4, e.size - 1))
            with pytest.raises(CommunicatorError, match="rank 0 sent 16 bytes where 20 or 4 are expected"):
                e.request(torch.zeros(4), torch.zeros(5), 1, overlap)()
            return True

        assert self.run(program, size) == [size - 1] + [True] * (size - 1)

    def test_requests_are_counted_where_they_leave(self, size: int, overlap: bool) -> None:
        def program(e: Communicator) -> dict[str, int]:
            if e.rank == SERVER:
                serve(e, 100, 2 * (e.size - 1), tail=90)
            else:
                e.request(torch.zeros(100), torch.zeros(100), 1, overlap)()
                e.request(torch.zeros(10), torch.zeros(100), 1, overlap)()
            return dict(e.traffic)

        served, *asked = self.run(program, size)
        assert served == {"respond calls": 2 * (size - 1), "respond bytes": 800 * (size - 1)}
        assert asked == [{"request calls": 2, "request bytes": 440}] * (size - 1)
