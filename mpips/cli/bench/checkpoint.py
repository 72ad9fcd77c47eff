"""A durable, verified checkpoint against merely copying or merely writing the same bytes.

mpips writes the weights and momentum of a run: HDF5, SHA-256, fsync, rename; by `ps.save()`, which returns when that is done,
and after a round that a checkpoint is due after, which is held for a copy only. All files are fsynced. None is read back from
the page cache during the measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mpips
from mpips import checkpoint
from mpips.cli.bench.agreement import difference
from mpips.cli.bench.case import Case, case, rate
from mpips.cli.bench.clock import WARM
from mpips.cli.bench.error import BenchError
from mpips.cli.bench.facts import facts
from mpips.cli.bench.gradient import initial, numel
from mpips.cli.bench.opponents import Functions, opponents
from mpips.cli.bench.own import Own, Parts, connected, join, momentum_sgd

MB = 1 << 20
Write = Callable[[], Path | None]


def checkpoints(options: argparse.Namespace) -> list[Case]:
    """Return one case for each size, measured in this process."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    against = opponents(options.against, "save")
    cases = []
    for mb in options.mb:
        print(f"mpips bench: {mb:g} MB", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="mpips-bench-", dir=options.folder) as name:
            cases.append(one_size(numel(mb * MB / 2), against, Path(name), options.repeats))
    return cases


def one_size(count: int, against: Functions, folder: Path, repeats: int) -> Case:
    """Measure all variants alternately, with `count` weights and as many momentum values."""
    model = Parts(initial(count))
    communicator = join()
    with connected(communicator, model, momentum_sgd(fused=True), folder, every=2) as ps:
        save = Save(ps, model)
        state = torch.cat([initial(count), initial(count)])
        writers: dict[str, Write] = {"mpips": save.write, **limits(state, folder)}
        writers |= {name: theirs(save_them, state, folder / name) for name, save_them in against.items()}
        seconds: dict[str, list[float]] = {name: [] for name in writers}
        for repeat in range(WARM + repeats):
            save.train()
            for name, taken in turn(writers):
                seconds[name] += [taken] if repeat >= WARM else []
            save.train_and_write()
        save.check()
        behind = save.behind()[WARM:]
        check_files(state, folder, against)
    found = case({"n": 1, "mb": 8 * count / MB}, seconds)
    where = {"repeats": repeats, "folder": str(folder.parent), "file_bytes": save.nbytes}
    found |= rate(found, "mb_per_s", found["mb"]) | beside(found, behind)
    return found | where | facts(library=False)


def beside(found: Case, behind: list[dict[str, float]]) -> Case:
    """Return how long a round was held for a checkpoint and how long its writing took, as times and against the limits."""
    held = 1e3 * statistics.median(event["held"] for event in behind)
    write = 1e3 * statistics.median(event["seconds"] - event["held"] for event in behind)
    ratios = {"held_to_memcpy": held / found["memcpy_ms"], "raw_write_to_behind": found["raw_write_ms"] / write}
    return {"held_ms": held, "behind_ms": write, **ratios}


def turn(writers: dict[str, Write]) -> Iterator[tuple[str, float]]:
    """Yield the seconds of each variant. Dirty pages are written back before each begins."""
    for name, write in writers.items():
        os.sync()
        begun = time.perf_counter()
        file = write()
        taken = time.perf_counter() - begun
        if file is not None and not file.exists():
            raise BenchError(f"{name}: {file.name} is not there when the call returns; no times given")
        yield name, taken


class Save:
    """mpips' variant."""

    def __init__(self, ps: mpips.Run, model: Parts) -> None:
        self._ps, self._model = ps, model
        self.nbytes = 0

    def train(self) -> None:
        """Train one round, so that there is something new to save."""
        own = Own(self._ps, 0, self._model)
        own.fill()
        own.round()
        own.leave()

    def train_and_write(self) -> None:
        """Train one round that a checkpoint is due after, and wait until it is on the disk."""
        os.sync()
        self.train()
        self._ps.meet()  # a checkpoint that is due is taken in the next call
        while not self._file.exists():
            time.sleep(0.001)

    def behind(self) -> list[dict[str, float]]:
        """Return the events of the checkpoints that were written while training might have gone on."""
        self.train()  # the last one is told of in the next round
        events = map(json.loads, (self._ps.folder / "events.jsonl").read_text().splitlines())
        return [event for event in events if event["event"] == "checkpoint" and event["round"] % 2 == 0]

    def write(self) -> Path:
        """Write the checkpoint and return its path."""
        self._ps.save()
        return self._file

    @property
    def _file(self) -> Path:
        return self._ps.folder / "checkpoints" / f"round_{self._ps.round:08d}.h5"

    def check(self) -> None:
        """Check that the checkpoint is valid and holds the model's weights."""
        self.nbytes = self._file.stat().st_size
        held = checkpoint.load(self._file)["parameters"]
        weights = [p.detach() for p in self._model.parts]
        if difference(weights, [held[f"parts.{number}"] for number in range(len(weights))]) != 0:
            raise BenchError("mpips: the checkpoint holds other weights than the model; no times given")


def limits(state: Tensor, folder: Path) -> dict[str, Write]:
    """Return the limits: a copy in memory; write and fsync of the bytes."""
    target = np.ones_like(state.numpy())

    def memcpy() -> None:
        np.copyto(target, state.numpy())

    def raw_write() -> Path:
        with (folder / "raw_write").open("wb", buffering=0) as file:
            rest = state.numpy().data.cast("B")
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        return folder / "raw_write"

    return {"memcpy": memcpy, "raw_write": raw_write}


def theirs(save: Callable[..., Any], state: Tensor, path: Path) -> Write:
    """Return the function that writes a checkpoint with an opponent's `save`, and fsync."""
    half = state.numel() // 2

    def write() -> Path:
        with path.open("wb") as file:
            save({"parameters": state[:half].clone(), "momentum": state[half:].clone()}, file)
            file.flush()
            os.fsync(file.fileno())
        return path

    return write


def check_files(state: Tensor, folder: Path, against: Iterable[str]) -> None:
    """Check that all bytes were written."""
    wrong = [name for name in against if (folder / name).stat().st_size < state.nbytes]
    if not np.array_equal(np.fromfile(folder / "raw_write", np.float32), state.numpy()):
        wrong.append("raw_write")
    if wrong:
        raise BenchError(f"{', '.join(wrong)}: the file does not hold the bytes; no times given")
