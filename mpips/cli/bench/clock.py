"""Alternation, barriers, seconds.

A measurement begins after a barrier. Variants alternate, and each repeat begins with another variant, so that other load on the
machine affects all of them equally.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mpips.comm.backoff import patiently

if TYPE_CHECKING:
    from mpi4py import MPI

WARM = 2  # measurements of each variant that do not count: buffers, page tables, connections


class Variant(Protocol):
    """One way to do the same work.

    Attributes:
        alone: whether rank 0 does the work alone while the other ranks sleep.
    """

    alone: bool

    def fill(self) -> None:
        """Prepare a round, untimed: new gradients."""

    def round(self) -> None:
        """Do the round that is timed."""


def interleave(comm: MPI.Comm, variants: Mapping[str, Variant], repeats: int, rounds: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each measurement of each variant; a measurement is the sum over `rounds` rounds."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(WARM + repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            taken = measure(comm, variants[name], rounds)
            seconds[name] += [taken] if repeat >= WARM else []
    return seconds


def measure(comm: MPI.Comm, variant: Variant, rounds: int) -> float:
    """Return the seconds of `rounds` rounds, without filling: each from the first rank's start to the last rank's end.

    Ranks that share a core leave a barrier one after another, so the time of each rank is too short. Between hosts, whose
    clocks differ, the longest time of a rank is used for want of better.
    """
    begun, ended = np.zeros(rounds), np.zeros(rounds)
    works = comm.rank == 0 or not variant.alone
    for number in range(rounds if works else 0):
        variant.fill()
        if not variant.alone:
            comm.Barrier()
        begun[number] = time.perf_counter()
        variant.round()
        ended[number] = time.perf_counter()
    sleep_until_all(comm)
    if variant.alone or not _one_clock(comm):
        return float(largest(comm, float((ended - begun).sum())))
    first, last = np.empty(rounds), np.empty(rounds)
    comm.Allreduce(begun, first, op=_minimum())
    comm.Allreduce(ended, last, op=_maximum())
    return float((last - first).sum())


def _one_clock(comm: MPI.Comm) -> bool:
    """Return whether all ranks are on one node and share its clock."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    size = node.size
    node.Free()
    return bool(size == comm.size)


def sleep_until_all(comm: MPI.Comm) -> None:
    """Wait for all ranks without taking a core from those that work."""
    patiently(comm.Ibarrier().Test)


def largest(comm: MPI.Comm, value: float) -> float:
    """Return the maximum over the ranks, on every rank; infinite if a value is NaN."""
    mine = np.array([value if value == value else np.inf])
    most = np.empty(1)
    comm.Allreduce(mine, most, op=_maximum())
    return float(most[0])


def _minimum() -> MPI.Op:
    """Return MPI.MIN."""
    from mpi4py import MPI

    return MPI.MIN


def _maximum() -> MPI.Op:
    """Return MPI.MAX."""
    from mpi4py import MPI

    return MPI.MAX
