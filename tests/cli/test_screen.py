"""The reader of events, the words for them, and the live region on a small model of a terminal."""

import io
import json
import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mpips.cli import screen
from mpips.cli.screen import Lines, Progress, Screen, Tail, view
from mpips.cli.screen.frame import frame
from mpips.cli.screen.progress import describe, progress_line

START = {
    "event": "start", "size": 4, "workers": 3, "server_trains": False, "script": "digits.py", "mpi": "Open MPI 5.0.11",
    "torch": "2.13.0", "device": "cpu", "parameters": 12345, "run_dir": "/runs/x",
}  # fmt: skip


def round_event(ranks=4, slowest=None):
    rows = [{"rank": 0, "role": "server", "state": "serving"}]
    rows += [{"rank": r, "role": "worker", "state": "training"} for r in range(1, ranks)]
    for row in rows:
        row |= {"samples_per_s": 611.0, "wait": 0.0 if row["rank"] == slowest else 0.3, "done": False}
    return {"event": "round", "round": 120.0, "version": 118, "epoch": 2, "epochs": 5, "loss": 0.41234, "samples": 192,
            "samples_per_s": 1840.0, "lr": 0.1, "ranks": rows}  # fmt: skip


VALIDATE = {"event": "validate", "epoch": 2, "round": 120, "value": 0.95, "best": 0.96, "name": "accuracy"}


def test_tail_gives_each_event_once_however_it_is_written(tmp_path):
    path = tmp_path / "events.jsonl"
    written = [{"event": "warning", "message": f"ünï {i}"} for i in range(5)]
    data = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in written).encode()
    tail, seen = Tail(path), []
    assert tail.read() == []
    with path.open("wb", buffering=0) as file:
        for i in range(len(data)):
            file.write(data[i : i + 1])
            seen += tail.read()
    assert seen == written


def test_tail_passes_over_torn_lines_and_starts_again_on_a_new_file(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "ro\n[1]\n\n{"event": "done"}\n{"event": "half')
    tail = Tail(path)
    assert tail.read() == [{"event": "done"}]
    path.write_text('{"event": "new"}\n')
    assert tail.read() == [{"event": "new"}]


def test_tail_gives_lines_of_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr(screen.progress, "READ_AT_ONCE", 16)
    path = tmp_path / "events.jsonl"
    written = [{"event": "trainable", "tensors": ["x" * 100]}, {"event": "validate", "value": 1}]
    path.write_text("".join(json.dumps(event) + "\n" for event in written))
    tail = Tail(path)
    assert [event for _ in range(9) for event in tail.read()] == written


def progressed(*events):
    progress = Progress()
    for event in events:
        progress.update(event)
    return progress


def test_progress_line():
    line = progress_line(progressed(START, round_event(), VALIDATE))
    assert line == "round 120 · epoch 2/5 · loss 0.4123 · 1,840 samples/s · accuracy 0.95 (best 0.96)"


def test_result_is_what_done_says_else_the_latest():
    checkpoint = {"event": "checkpoint", "round": 100, "path": "/runs/x/c.h5"}
    before = progressed(round_event(), VALIDATE, checkpoint)
    assert before.result() == {"rounds": 120.0, "value": 0.95, "checkpoint": "/runs/x/c.h5"}
    before.update({"event": "done", "rounds": 300, "value": 0.97, "checkpoint": "/runs/x/d.h5"})
    assert before.result() == {"rounds": 300, "value": 0.97, "checkpoint": "/runs/x/d.h5"}


KINDS = ("start", "plan", "round", "validate", "checkpoint", "resume", "stop", "warning", "error", "done", "unheard-of")


@pytest.mark.parametrize("value", [None, float("nan"), "text", [], {}, True, -1e300, "two\nlines"])
def test_no_field_of_an_event_stops_the_screen(value):
    names = set(START) | set(round_event()) | set(VALIDATE) | {"path", "seconds", "reason", "message", "rounds"}
    events = [{**dict.fromkeys(names, value), "event": kind} for kind in KINDS] + [{"event": kind} for kind in KINDS]
    rank = {
        "event": "round",
        "ranks": [dict.fromkeys(("rank", "role", "state", "samples_per_s", "wait"), value), value],
    }
    for event in [*events, rank]:
        progress = progressed(event)
        describe(event), progress_line(progress), progress.result()
        assert drawn(progress, 60, 20)


def drawn(progress, width, height):
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False)
    return [Text.from_ansi(line).plain for line in frame(console, progress, 67.0, width, height)]


@pytest.mark.parametrize("ranks", [1, 4, 1000])
@pytest.mark.parametrize(("width", "height"), [(19, 5), (59, 19), (99, 29), (200, 100)])
def test_a_frame_fits_its_terminal(ranks, width, height):
    progress = progressed(START, *[{**VALIDATE, "name": "a" * 90}] * 9, round_event(ranks))
    lines = drawn(progress, width, height)
    assert 1 <= len(lines) <= height
    assert max(map(cell_len, lines)) <= width


def test_a_frame_shows_header_progress_and_every_rank():
    text = "\n".join(drawn(progressed(START, round_event(), VALIDATE), 120, 30))
    assert "1:07 · digits.py · 4 ranks, 3 workers · Open MPI 5.0.11 · torch 2.13.0 cpu" in text
    assert "accuracy 0.95 (best 0.96)" in text
    assert re.search(r"0 +server +serving +611 +30%\n +1 +worker +training +611 +30%", text)


def test_with_many_ranks_the_one_that_the_others_wait_for_is_shown():
    text = "\n".join(drawn(progressed(START, round_event(500, slowest=377)), 120, 30))
    assert re.search(r"377 +worker +training", text)
    assert "of 500 ranks shown" in text
    assert "499 training" in text


class Terminal:
    """As much of a terminal as the screen uses: text that wraps, newline, return, cursor up, erase below."""

    def __init__(self, width):
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def feed(self, data):
        for up, code, char in re.findall(r"\x1b\[(\d*)([A-Za-z])|([^\x1b])", data.decode()):
            if code == "A":
                self.row -= int(up)
                assert self.row >= 0
            elif code == "J":
                del self.lines[self.row + 1 :]
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif char == "\r":
                self.column = 0
            elif char == "\n" or (char and self.column == self.width):
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            if char and char not in "\r\n":
                line = self.lines[self.row]
                self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
                self.column += 1

    def rewrap(self, width):
        """What a terminal does to its lines when it becomes narrower."""
        pieces = [line[i : i + width] for line in self.lines for i in range(0, max(1, len(line)), width)]
        self.width, self.lines, self.row, self.column = width, pieces, len(pieces) - 1, 0


@pytest.fixture
def terminal(monkeypatch):
    terminal = Terminal(100)
    monkeypatch.setattr(screen, "_size", lambda: (terminal.width, 24))
    monkeypatch.setattr(screen.outlet, "emit", lambda stream, data: terminal.feed(data))
    monkeypatch.setattr(screen, "DRAW_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return terminal


def test_what_ranks_print_stays_above_one_live_region(terminal):
    shown, progress = Screen(), progressed(START, round_event())
    for i in range(4):
        shown.show(progress)
        shown.write(1, f"[b]line {i}[/b]\nhal".encode())
        shown.write(2, b"error %d\n" % i)
        shown.write(1, b"f %d\n" % i)
    shown.tell("a word")
    shown.close(progress)
    above = [line for i in range(4) for line in (f"[b]line {i}[/b]", f"error {i}", f"half {i}")]
    assert terminal.lines[:13] == [*above, "mpips: a word"]
    assert terminal.lines[13].startswith("mpips ")
    assert sum("rank  role" in line for line in terminal.lines) == 1
    assert terminal.lines[-1] == ""


def test_the_region_is_redrawn_in_place_when_the_terminal_becomes_narrower(terminal):
    shown, progress = Screen(), progressed(START, round_event(), VALIDATE)
    shown.write(1, b"before\n")
    shown.show(progress)
    terminal.rewrap(60)
    shown.show(progress)
    assert terminal.lines[0] == "before"
    assert [line[:6] for line in terminal.lines].count("mpips ") == 1
    assert sum("rank  role" in line for line in terminal.lines) == 1


def test_the_last_half_line_is_not_lost(terminal):
    shown = Screen()
    shown.write(1, b"no newline")
    shown.close(Progress())
    assert terminal.lines[0] == "no newline"


def test_lines_pass_the_ranks_bytes_unchanged(capfdbinary):
    lines, data = Lines(), b"a\r\x1b[31mb\xff\n half"
    lines.write(1, data)
    lines.write(2, b"e\n")
    lines.write(2, b"half")
    lines.tell("word")
    out, err = capfdbinary.readouterr()
    assert out == data
    assert err == b"e\nhalf\nmpips: word\n"


def test_how_a_run_is_made_is_said_at_its_start(capfd):
    lines = Lines()
    for event in (START, {"event": "plan", "plan": "sharded", "exchange": "shared memory"}, VALIDATE):
        lines.note(event)
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(" ")[2].partition(",")[0] for line in said] == ["run folder /runs/x", "plan: sharded"]


def test_progress_lines_are_rare_and_only_about_progress(capfd, monkeypatch):
    now = 100.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    lines, progress = Lines(), progressed(round_event())
    for _ in range(100):  # 50 s, then 50 s without a new round
        now += 0.5
        progress.update(round_event())
        lines.show(progress)
    for _ in range(100):
        now += 0.5
        lines.show(progress)
    assert capfd.readouterr().err.count("mpips: round 120") in (5, 6)


@pytest.mark.parametrize(
    ("tty", "term", "json_wanted", "expected"),
    [
        (True, "xterm", False, Screen),
        (True, "dumb", False, Lines),
        (True, "xterm", True, Lines),
        (False, "xterm", False, Lines),
    ],
)
def test_the_live_screen_needs_a_real_terminal(monkeypatch, tty, term, json_wanted, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setenv("TERM", term)
    assert type(view(json_wanted=json_wanted)) is expected


def test_no_color_is_respected(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    sent = []
    monkeypatch.setattr(screen.outlet, "emit", lambda stream, data: sent.append(data))
    Screen().show(progressed(START, round_event()))
    assert b"training" in b"".join(sent)
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", b"".join(sent))
