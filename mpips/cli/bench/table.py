"""The figures as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from mpips.cli.bench.case import BOUNDS, Case, variants

RATES = ("rounds_per_s", "samples_per_s", "mb_per_s")


def table(kind: str, cases: Sequence[Case], command: Sequence[str]) -> str:
    """Return where it was measured, the figures, and the command that repeats the measurement."""
    first = cases[0]
    shown = next((rate for rate in RATES if f"mpips_{rate}" in first), None)
    lines = [f"mpips bench {kind}: {where(first)}", "", heading(shown)]
    for each in cases:
        lines += ["", *rows(each, shown)]
    if "held_ms" in first:
        lines.append("")
    for each in cases if "held_ms" in first else []:
        lines.append(
            f"{each['mb']:g} MB written while training goes on: a round held {each['held_ms']:.1f} ms, "
            f"{each['held_to_memcpy']:.2f} copies; on the disk {each['behind_ms']:.1f} ms later, at "
            f"{each['raw_write_to_behind']:.2f} of raw_write's speed"
        )
    if "efficiency" in first:
        lines += ["", f"efficiency {first['efficiency']:.2f}: mpips' speed over {first['together']} times that of plain"]
    if "difference" in first:
        worst = max(float(each["difference"]) for each in cases)
        lines += [
            "",
            f"same weights in all variants: largest difference {worst:.2g}, allowed {first['allowed']:g}, of 1 + |weight|",
        ]
    return "\n".join([*lines, f"repeat with: {shlex.join(command)}"])


def where(of: Case) -> str:
    """Return cores, libraries and settings as text."""
    ranks = "" if of["hosts"] == 1 else f" of each of {of['hosts']} hosts"
    parts = [f"{of['cores']} cores{ranks}, load {of['load']:g}", str(of.get("mpi", "no MPI")), f"torch {of['torch']}"]
    parts += [f"{of['threads']} thread(s) a rank", f"{of['repeats']} repeats of {of.get('rounds', of.get('steps', 1))}"]
    if "step" in of:
        parts.append(f"momentum SGD ({of['step']})")
    return ", ".join(parts + [f"{name}={value}" for name, value in of["settings"].items()])


def heading(shown: str | None) -> str:
    """Return the names of the columns."""
    last = f" {shown.replace('_per_', '/').replace('_', ' '):>13}" if shown else ""
    return f"{'ranks':>5} {'MB':>9}  {'variant':<13} {'median ms':>11} {'min ms':>11} {'max ms':>11} {'ratio':>7}{last}"


def rows(of: Case, shown: str | None) -> Iterator[str]:
    """Yield one line for each variant. A bound's ratio is how many times as long mpips takes, an opponent's the inverse."""
    size = f"{of['mb']:g}"[:9] if "mb" in of else "-"
    for number, name in enumerate(variants(of)):
        label = f"{of['n']:>5} {size:>9}" if number == 0 else " " * 15
        times = " ".join(f"{of[f'{name}{part}_ms']:>11.3f}" for part in ("", "_min", "_max"))
        ratio = of.get(f"mpips_to_{name}" if name in BOUNDS else f"{name}_to_mpips")
        mark = "" if ratio is None else f"{ratio:.2f}" + ("L" if name in BOUNDS else "x")
        rate = f" {of[f'{name}_{shown}']:>13,.1f}" if shown else ""
        yield f"{label}  {name:<13} {times} {mark:>7}{rate}".rstrip()
