from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from mpips.cli.screen import Tail
from mpips.report.run_report import LOG, Report, log_to, rank_states, stop_copying


def rows(report: Report, numbers: range) -> None:
    for n in numbers:
        report.round((n, 0, n, 8, 1 / (n + 1), 0.1), 1.0, list)


def test_metrics_are_exact_and_a_restored_report_rewrites_them(tmp_path: Path) -> None:
    report = Report(tmp_path)
    rows(report, range(1, 6))
    report.flush()
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines()[0] == "round,epoch,version,samples,loss,lr"
    assert [float(line.split(",")[4]) for line in text.splitlines()[1:]] == [1 / (n + 1) for n in range(1, 6)]

    again = Report(tmp_path)
    again.restore(3, 0, tmp_path)
    rows(again, range(4, 6))
    again.flush()
    assert (tmp_path / "metrics.csv").read_text() == text


def test_a_table_that_is_gone_is_said_and_the_rows_after_it_are_kept(tmp_path: Path) -> None:
    report = Report(tmp_path)
    report.restore(3, 1, tmp_path / "elsewhere")
    rows(report, range(4, 6))
    report.flush()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    events = (tmp_path / "events.jsonl").read_text()
    assert "metrics.csv has 0 of the 3 rows" in events and "validations.csv has 0 of the 1 rows" in events
    assert report.metrics.count == 2 and report.validations.count == 0


def test_nothing_of_a_round_or_a_validation_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """382 bytes a round were kept by rank 0, and written into every checkpoint."""
    monkeypatch.setattr(LOG, "disabled", True)  # pytest keeps what is logged
    report = Report(tmp_path)
    rows(report, range(10))

    def more(count: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for n in range(count):
            report.round((n, 0, n, 8, 1 / (n + 1), 0.1), 1.0, list)
            report.validated(0, n, n / 7, 0.5, 'accuracy,\n"top 5"')
            if n % 100 == 0:
                report.flush()
        report.flush()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        more(2000)  # Python 3.10 takes that long to have its strings and caches
        assert more(2000) < 2000
    finally:
        tracemalloc.stop()
    assert report.values == [n / 7 for n in [*range(2000)] * 2]
    assert (tmp_path / "validations.csv").read_text().splitlines()[:2] == [
        "round,epoch,value,name",
        '0,0,0.0,"accuracy, ""top 5"""',
    ]


def test_validations_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    report = Report(tmp_path)
    for n in range(5):
        report.validated(n, n, 0.5 + n, 0.5, "accuracy")
    report.flush()
    again = Report(tmp_path)
    again.restore(0, 3, tmp_path)
    again.validated(3, 3, 9.0, 9.0, "accuracy")
    assert again.values == [0.5, 1.5, 2.5, 9.0] and again.validations.count == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "logs", "metrics.csv", "validations.csv"]


def test_events_of_rounds_are_few_and_all_others_are_kept(tmp_path: Path) -> None:
    report = Report(tmp_path)
    rows(report, range(1000))
    for n in range(10):
        report.event("warning", message=str(n))
    kinds = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds.count("warning") == 10
    assert 1 <= kinds.count("round") < 100


def test_done_appears_last_and_a_new_run_removes_it(tmp_path: Path) -> None:
    report = Report(tmp_path)
    rows(report, range(3))
    report.done({"seconds": 1.0, "rounds": 3, "value": None, "checkpoint": None})
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "DONE").read_text())["rounds"] == 3
    again = Report(tmp_path)
    assert (tmp_path / "DONE").exists(), "nothing has begun yet"
    rows(again, range(1))
    assert not (tmp_path / "DONE").exists()


def test_ranks_print_nothing_where_the_launcher_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch").mkdir()
    monkeypatch.setenv("MPIPS_LAUNCH_DIR", str(tmp_path / "launch"))
    report = Report(tmp_path / "run")
    rows(report, range(3))
    report.validated(0, 3, 0.5, 0.5, "accuracy")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "launch" / "run_dir").read_text() == str(tmp_path / "run")


def test_progress_lines_are_rare_and_validations_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path)
    rows(report, range(1000))
    report.validated(2, 1000, 0.5, 0.5, "accuracy")
    report.validated(3, 2000, 0.75, 0.75, "accuracy")
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if "accuracy" in line] == [
        "mpips: epoch 2  round 1000  loss 0.0010  accuracy 0.5000",
        "mpips: epoch 3  round 2000  loss 0.0010  accuracy 0.7500",
    ]
    assert len(out) <= 4


def test_a_report_without_a_folder_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None)
    rows(report, range(3))
    report.validated(0, 3, 0.5, 0.5, "accuracy")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert report.metrics.count == 3 and report.values == []


def test_rank_states_are_rates_and_shares() -> None:
    rows_of = {
        1: {"train": 3.0, "wait": 1.0, "samples": 8.0, "done": 0.0},
        2: {"train": 0, "wait": 0, "samples": 0, "done": 1.0},
    }
    server, first, second = rank_states(rows_of, server_trains=False)
    assert (server["role"], first["samples_per_s"], first["wait"], first["state"]) == ("server", 2.0, 0.25, "training")
    assert (second["state"], second["samples_per_s"]) == ("done", 0)
    assert [entry["rank"] for entry in rank_states(rows_of, server_trains=True)] == [1, 2]


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0" * 200_000, b'{"event": "roun', b'{"event": "roun' + b"\0" * 70_000])
def test_what_a_crash_of_the_machine_has_left_at_the_end_spoils_no_later_event(tail: bytes, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"event": "start"}\n' + tail)
    Report(tmp_path).event("resume")
    assert b"\0" not in file.read_bytes()
    assert [event["event"] for event in Tail(file).read()] == ["start", "resume"]


def test_rows_that_a_crash_of_the_machine_has_spoilt_are_said_and_not_taken_over(tmp_path: Path) -> None:
    first = Report(tmp_path)
    for number in range(1, 5):
        first.round((number, 1, number, 8, 0.5, 0.1), 1.0, list)
    first.flush()
    table = (tmp_path / "metrics.csv").read_bytes()
    lines = table.splitlines(keepends=True)
    for spoilt in (
        b"".join(lines[:3]) + b"\0" * 40,
        b"".join(lines[:3]) + b"\0" * 40 + lines[4],
        b"".join(lines[:3]) + b"3,1,3",
    ):
        before = tmp_path / "before" / "metrics.csv"
        before.parent.mkdir(exist_ok=True)
        before.write_bytes(spoilt)
        again = Report(tmp_path)
        again.restore(4, 0, before.parent)
        again.flush()
        assert (tmp_path / "metrics.csv").read_bytes() == b"".join(lines[:3])
    assert "has 2 of the 4 rows before this checkpoint" in (tmp_path / "events.jsonl").read_text()


def test_the_rows_that_a_checkpoint_counts_are_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((tmp_path / "metrics.csv").read_bytes()))
    report = Report(tmp_path)
    report.round((1, 1, 1, 8, 0.5, 0.1), 1.0, list)
    report.flush()
    assert not synced
    report.sync()
    assert synced[0].endswith(b"1,1,1,8,0.5,0.1\n")

    def refuse(fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    report.sync()


def test_the_log_has_what_the_rank_prints_by_whatever_handle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = logging.StreamHandler(sys.stderr)  # made before the run
    print("before")
    log_to(tmp_path, 1, "5ca1ab1e")
    print("out", 1, flush=True)
    kept.emit(logging.LogRecord("x", logging.WARNING, "", 0, "logged \xfc\0", (), None))
    sys.stdout.writelines(["half", " a line"])
    log_to(tmp_path, 2, "5ca1ab1e")  # the next run of this process
    print("second")
    stop_copying()
    print("after")
    first, second = ((tmp_path / "logs" / f"rank_000{rank}.log").read_bytes() for rank in (1, 2))
    (head, first), (_, second) = (log.split(b"\n", 1) for log in (first, second))
    assert head.endswith(b"INFO run 5ca1ab1e")
    assert (first, second) == (b"out 1\nlogged \xc3\xbc\nhalf a line", b"second\n")
    out, err = capsys.readouterr()
    assert (out, err) == ("before\nout 1\nhalf a linesecond\nafter\n", "logged \xfc\0\n")


def test_a_log_on_a_full_disk_is_no_matter_of_a_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0001.log").symlink_to("/dev/full")
    log_to(tmp_path, 1, "5ca1ab1e")
    print("said")
    stop_copying()
    assert capsys.readouterr().out == "said\n"
    log_to(tmp_path / "next", 1, "5ca1ab1e")  # the script's next run, elsewhere
    assert "5ca1ab1e" in (tmp_path / "next" / "logs" / "rank_0001.log").read_text()
