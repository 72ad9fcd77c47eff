"""Checking that no variant leaves work out: all have the same weights at the end, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mpips.cli.bench.clock import largest
from mpips.cli.bench.error import BenchError

if TYPE_CHECKING:
    from mpi4py import MPI

ROUNDING = 1e-5  # of 1 + |weight|: some hundred rounds of sums in another order
ROUNDED = 2**-7  # the same with comm_dtype bfloat16, which rounds each node's sums to 8 bits


def agree(comm: MPI.Comm, weights: Mapping[str, Sequence[Tensor]], where: str, allowed: float = ROUNDING) -> float:
    """Return the largest difference to mpips' weights on any rank, relative to 1 + |weight|.

    Args:
        comm: all ranks.
        weights: the weights of each variant, in parts. A variant that a rank does not run is missing there.
        where: what was measured, for the message.
        allowed: the largest difference that rounding explains.

    Raises:
        BenchError: on every rank. It names the variants that differ; if all do, mpips is wrong.
    """
    differences = {}
    for name in sorted(n for n in ("raw_mpi", "ddp_gloo", "plain", "plain_threads") if _somewhere(comm, n in weights)):
        differences[name] = largest(comm, difference(weights["mpips"], weights[name]) if name in weights else 0.0)
    wrong = {name: how for name, how in differences.items() if not how <= allowed}
    if wrong:
        details = ", ".join(f"{name} by {how:.3g}" for name, how in wrong.items())
        raise BenchError(f"{where}: other weights than mpips has: {details}, allowed {allowed:g}; no times given")
    return max(differences.values(), default=0.0)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return max |a - b| / (1 + |a|); infinite if a value is not finite."""
    found = [((a - b).abs_() / (1 + a.abs())).max() for a, b in zip(ours, theirs, strict=True)]
    return max((float(x) if x.isfinite() else float("inf") for x in found), default=0.0)


def _somewhere(comm: MPI.Comm, here: bool) -> bool:
    """Return whether `here` is true on any rank."""
    return largest(comm, float(here)) > 0
