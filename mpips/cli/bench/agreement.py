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


def agree(
    comm: MPI.Comm, ours: Sequence[Tensor], others: Mapping[str, Sequence[Tensor] | None], where: str, allowed: float = ROUNDING
) -> dict[str, float]:
    """Compare the weights of all variants.

    Args:
        comm: all ranks.
        ours: mpips' weights, in parts.
        others: the weights of each other variant, in the same parts; None on a rank that does not have them.
        where: what was measured, for the message.
        allowed: the largest difference that rounding explains.

    Returns:
        `difference`, the largest to mpips' weights on any rank relative to 1 + |weight|, and `allowed`. Nothing if there are
        no others.

    Raises:
        BenchError: on every rank. It names the variants that differ; if all do, mpips is wrong.
    """
    differences = {name: largest(comm, 0.0 if theirs is None else difference(ours, theirs)) for name, theirs in others.items()}
    wrong = {name: how for name, how in differences.items() if not how <= allowed}
    if wrong:
        details = ", ".join(f"{name} by {how:.3g}" for name, how in wrong.items())
        raise BenchError(f"{where}: other weights than mpips has: {details}, allowed {allowed:g}; no times given")
    return {"difference": max(differences.values()), "allowed": allowed} if differences else {}


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return max |a - b| / (1 + |a|); infinite if a value is not finite."""
    found = [((a - b).abs_() / (1 + a.abs())).max() for a, b in zip(ours, theirs, strict=True)]
    return max((float(x) if x.isfinite() else float("inf") for x in found), default=0.0)
