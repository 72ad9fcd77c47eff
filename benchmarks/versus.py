"""What the head-to-heads with other packages share: turns in the same processes, and the lines that say how they went."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

from mpi4py import MPI

from mpips.cli.bench.clock import measure

WARM = 2  # rounds of each that are not counted


class Call:
    """A round, for the clock of `mpips bench`."""

    alone = False

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def fill(self) -> None:
        """Nothing: what is to be sent is there."""

    def round(self) -> None:
        """The call."""
        self._call()


def timed(comm: MPI.Comm, call: Callable[[], object]) -> float:
    """Seconds from the first rank's beginning to the last one's end."""
    return measure(comm, Call(call), 1)


def arguments(description: str | None) -> argparse.Namespace:
    """Sizes and repeats."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, nargs="+", default=[1, 100], help="sizes of the model, of 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


def show(mb: float, seconds: dict[str, list[float]]) -> None:
    """The times of both, mpips' first, and their ratio."""
    for name, its in seconds.items():
        low, middle, high = (1e3 * f(its) for f in (min, statistics.median, max))
        print(f"{mb:6g} MB {name:>10} {middle:9.2f} ms  ({low:.2f} to {high:.2f})", flush=True)
    (own, ours), (other, theirs) = seconds.items()
    print(f"{mb:6g} MB {other} / {own}: {statistics.median(theirs) / statistics.median(ours):.1f}, same weights", flush=True)
