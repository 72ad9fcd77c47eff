"""The figures of one measurement as a flat dict: median, min and max of each variant, and the ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Case = dict[str, Any]
BOUNDS = ("limit", "memcpy", "raw_write")  # lower bounds; their ratio is how many times as long mpips takes


def case(label: Mapping[str, float], seconds: Mapping[str, Sequence[float]], rounds: int = 1) -> Case:
    """Return the figures.

    Args:
        label: what was measured: ranks, size.
        seconds: the seconds of each measurement of each variant; one variant is mpips.
        rounds: the number of rounds in a measurement.

    Returns:
        `<variant>_ms`, `_min_ms`, `_max_ms` for one round; `mpips_to_<bound>` and `<opponent>_to_mpips`, ratios of the medians.
    """
    found: Case = dict(label)
    medians = {name: statistics.median(taken) / rounds for name, taken in seconds.items()}
    found |= {f"{name}_ms": 1e3 * median for name, median in medians.items()}
    for name, taken in seconds.items():
        found |= {f"{name}_min_ms": 1e3 * min(taken) / rounds, f"{name}_max_ms": 1e3 * max(taken) / rounds}
    return found | ratios(medians)


def ratios(medians: Mapping[str, float]) -> Case:
    """Return the ratios of mpips to each bound, and of each opponent to mpips: above 1 means that mpips is faster."""
    ours = medians["mpips"]
    others = {name: median for name, median in medians.items() if name != "mpips"}
    return {
        f"mpips_to_{name}" if name in BOUNDS else f"{name}_to_mpips": ours / median if name in BOUNDS else median / ours
        for name, median in others.items()
    }


def variants(of: Case) -> list[str]:
    """Return the names of the variants in a case."""
    return [key.removesuffix("_min_ms") for key in of if key.endswith("_min_ms")]


def rate(of: Case, name: str, work: float) -> Case:
    """Return `<variant>_<name>` for each variant: its work per second, given the work of a round."""
    return {f"{variant}_{name}": 1e3 * work / of[f"{variant}_ms"] for variant in variants(of)}
