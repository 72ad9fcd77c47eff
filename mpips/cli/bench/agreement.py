"""Nothing is won by leaving work out: all variants have the same weights in the end, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mpips.cli.bench.clock import largest
from mpips.cli.bench.error import BenchError

if TYPE_CHECKING:
    from mpi4py import MPI

ROUNDING = 1e-5  # of 1 + |weight|: sums in another order, of some hundred rounds
ROUNDED = 2**-7  # the same on a wire of bfloat16, which rounds each node's sums to 8 bits


def agree(comm: MPI.Comm, weights: Mapping[str, Sequence[Tensor]], where: str, allowed: float = ROUNDING) -> float:
    """The largest difference to mpips' weights on any rank, as a share of 1 + |weight|.

    Args:
        comm: all ranks.
        weights: of each variant, in parts; one that a rank does not have is left out there.
        where: what was measured, for the message.
        allowed: the largest difference that rounding explains.

    Raises:
        BenchError: on every rank, naming the variants that differ; if all do, it is mpips.
    """
    off = {}
    for name in sorted(n for n in ("raw_mpi", "ddp_gloo", "plain", "plain_threads") if _somewhere(comm, n in weights)):
        off[name] = largest(comm, difference(weights["mpips"], weights[name]) if name in weights else 0.0)
    wrong = {name: how for name, how in off.items() if not how <= allowed}
    if wrong:
        said = ", ".join(f"{name} by {how:.3g}" for name, how in wrong.items())
        raise BenchError(f"{where}: other weights than mpips has: {said}, allowed {allowed:g}; no times given")
    return max(off.values(), default=0.0)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """max |a - b| / (1 + |a|); not finite if one of them is not."""
    found = [((a - b).abs_() / (1 + a.abs())).max() for a, b in zip(ours, theirs, strict=True)]
    return max((float(x) if x.isfinite() else float("inf") for x in found), default=0.0)


def _somewhere(comm: MPI.Comm, here: bool) -> bool:
    return largest(comm, float(here)) > 0
