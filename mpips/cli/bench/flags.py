"""The benchmarks' flags: those of `mpips bench`, and those passed to its ranks."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "round": "gradients in place on every rank until every rank has the new weights",
    "small": "rounds a second of small models",
    "train": "samples a second end to end: one process without mpips, DDP, mpips",
    "checkpoint": "a checkpoint against memcpy, write and fsync, torch.save",
    "scaling": "a round on 2, 4, 8 ranks",
}
TOLD = {  # the flags passed to the ranks
    "round": ("mb", "repeats", "step", "against"),
    "small": ("kb", "rounds", "repeats", "step", "against"),
    "train": ("steps", "batch_size", "data", "repeats", "against"),
    "checkpoint": ("mb", "folder", "repeats", "against"),
    "scaling": ("mb", "repeats", "step", "against"),
}
LEAST_REPEATS = 7  # fewer give no reliable median


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each benchmark, with its flags."""
    kinds = parser.add_subparsers(metavar="KIND", dest="kind", required=True)
    for kind, text in KINDS.items():
        _add_flags(kinds.add_parser(kind, help=text, description=text), kind)


def _add_flags(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the flags of a benchmark."""
    add = parser.add_argument
    if kind == "scaling":
        add("-n", dest="size", type=_list(_ranks), default=[2, 4, 8], metavar="N,N,...", help="ranks (2,4,8)")
    elif kind != "checkpoint":
        add("-n", dest="size", type=_ranks, default=4, metavar="N", help="ranks to start (4); under mpirun it says")
    if "mb" in TOLD[kind]:
        sizes = {"round": [1.0, 16.0, 64.0, 256.0], "scaling": [64.0], "checkpoint": [256.0]}[kind]
        text = (
            "sizes of the model, of 2^20 bytes ({})"
            if kind != "checkpoint"
            else "sizes of model and momentum, of 2^20 bytes ({})"
        )
        add("--mb", type=_list(_positive), default=sizes, metavar="MB,...", help=text.format(comma(sizes)))
    if kind == "small":
        add(
            "--kb",
            type=_list(_positive),
            default=[4.0, 64.0, 1024.0],
            metavar="KB,...",
            help="sizes of the model, of 2^10 bytes (4,64,1024)",
        )
        add("--rounds", type=_at_least(1), default=50, metavar="R", help="rounds a measurement (50)")
    if kind == "train":
        add("--steps", type=_at_least(1), default=20, metavar="S", help="steps a measurement (20)")
        add("--batch-size", type=_at_least(1), default=64, metavar="B", help="samples a worker and step (64)")
        add(
            "--data",
            type=_file("an HDF5 file"),
            metavar="FILE",
            help="MNIST as examples/mnist.py reads it; images made up if not given",
        )
    if kind == "checkpoint":
        add("--folder", type=_folder, metavar="PATH", help="where to write; the temporary folder if not given")
    if "step" in TOLD[kind]:
        text = "torch's SGD with momentum, alike for all: fused=True, or plain as by default (fused)"
        add("--step", choices=["fused", "plain"], default="fused", help=text)
    text = f"measurements of each variant, at least {LEAST_REPEATS} (9)"
    add("--repeats", type=_at_least(LEAST_REPEATS), default=9, metavar="R", help=text)
    text = "files of opponents, see benchmarks/README.md; by default those of the source tree, if mpips runs from one"
    add("--against", type=_file("a Python file"), nargs="*", metavar="PATH", help=text)
    add("--out", type=Path, metavar="FOLDER", help="also write table, JSON and picture there")
    add("--mpi-args", type=shlex.split, default=[], metavar='"..."', help="further flags for mpiexec")
    add("--json", action="store_true", default=argparse.SUPPRESS, help="print only JSON: a list, one object a size")


def words(options: argparse.Namespace) -> list[str]:
    """Return the benchmark and its flags without -n, as they would be typed."""
    line = [str(options.kind)]
    for name in TOLD[options.kind]:
        value = getattr(options, name)
        if value is None:
            continue
        line.append(f"--{name.replace('_', '-')}")
        if name == "against":
            line += map(str, value)
        else:
            line.append(comma(value) if isinstance(value, list) else str(value))
    return line


def comma(numbers: list[float]) -> str:
    """Return the numbers as text, such as `1,16,0.25`."""
    return ",".join(f"{number:g}" for number in numbers)


def _list(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a function that converts a text with commas to a list."""

    def several(text: str) -> list[Any]:
        return [one(part) for part in text.split(",")]

    return several


def _at_least(least: int) -> Callable[[str], int]:
    """Return a function that converts a text to a whole number of at least `least`."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number of at least {least}")
        return int(text)

    return whole


_ranks = _at_least(2)


def _positive(text: str) -> float:
    """Return the text as a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected numbers above 0 with commas between them")
    return number


def _file(kind: str) -> Callable[[str], Path]:
    """Return a parser of the path of an existing file."""

    def file(text: str) -> Path:
        if not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"{text!r} given, expected {kind} that exists")
        return Path(text)

    return file


def _folder(text: str) -> Path:
    """Return the path of an existing folder."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a folder that exists")
    return Path(text)
