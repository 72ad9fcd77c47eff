from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpips.report import Report, rank_states


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
    again.restore(3, tmp_path / "metrics.csv", [])
    rows(again, range(4, 6))
    again.flush()
    assert (tmp_path / "metrics.csv").read_text() == text


def test_a_table_that_is_gone_is_said_and_the_rows_after_it_are_kept(tmp_path: Path) -> None:
    report = Report(tmp_path)
    report.restore(3, tmp_path / "elsewhere.csv", [])
    rows(report, range(4, 6))
    report.flush()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert "has 0 of the 3 rows" in (tmp_path / "events.jsonl").read_text()


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
    assert report.count == 3


def test_rank_states_are_rates_and_shares() -> None:
    rows_of = {
        1: {"train": 3.0, "wait": 1.0, "samples": 8.0, "done": 0.0},
        2: {"train": 0, "wait": 0, "samples": 0, "done": 1.0},
    }
    server, first, second = rank_states(rows_of, server_trains=False)
    assert (server["role"], first["samples_per_s"], first["wait"], first["state"]) == ("server", 2.0, 0.25, "training")
    assert (second["state"], second["samples_per_s"]) == ("done", 0)
    assert [entry["rank"] for entry in rank_states(rows_of, server_trains=True)] == [1, 2]
