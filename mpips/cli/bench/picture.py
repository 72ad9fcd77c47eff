"""The figures as a bar chart; needs the extra package matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpips.cli.bench.case import Case, variants


def draw(kind: str, cases: Sequence[Case], path: Path) -> bool:
    """Write a PNG with medians as bars, min and max as whiskers; return False if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(1.5 + 2.0 * len(cases), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = variants(cases[0])
    for number, name in enumerate(names):
        medians = [float(each[f"{name}_ms"]) for each in cases]
        below = [median - float(each[f"{name}_min_ms"]) for median, each in zip(medians, cases, strict=True)]
        above = [float(each[f"{name}_max_ms"]) - median for median, each in zip(medians, cases, strict=True)]
        places = [at + (number - (len(names) - 1) / 2) * 0.8 / len(names) for at in range(len(cases))]
        axes.bar(places, medians, 0.8 / len(names), yerr=[below, above], capsize=2, label=name)
    axes.set_xticks(range(len(cases)), [title(each) for each in cases])
    axes.set_yscale("log")
    axes.set_ylabel("ms: median, min to max")
    axes.set_title(f"mpips bench {kind}: {cases[0]['cores']} cores")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def title(of: Case) -> str:
    """Return the label of a group of bars."""
    size = f", {of['mb']:.3g} MB" if "mb" in of else ""
    return f"{of['n']} rank{'s' if of['n'] > 1 else ''}{size}"
