"""The prediction as text, and as a JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpips.cli.plan.job import Job, Machine
from mpips.cli.plan.memory import Item, memory
from mpips.cli.plan.round import PARTS, Round


def facts(job: Job, machine: Machine, found: Round) -> dict[str, Any]:
    """Return all figures, in bytes and seconds."""
    return {
        "nodes": job.nodes,
        "ranks_per_node": job.ranks,
        "model_bytes": job.model,
        "wire": str(job.codec.wire).removeprefix("torch."),
        "how": job.how,
        "machine": vars(machine),
        "memory": {name: vars(item) for name, item in memory(job).items()},
        "phases": {name: {**vars(phase), "seconds": phase.seconds} for name, phase in found.phases.items()},
        **{name: value for name, value in vars(found).items() if name != "phases"},
        "ratio": found.seconds / found.bound if found.bound else None,
        "bottleneck": found.bottleneck,
    }


def table(job: Job, machine: Machine, found: Round) -> str:
    """Return the prediction as text: job, memory, phases, traffic, and comparisons."""
    lines = [f"mpips plan: {heading(job, machine)}", ""]
    lines += [*remembered(memory(job)), "", *phased(found), ""]
    lines += [f"{name:<17}{text}" for name, text in summary(found)]
    return "\n".join(lines)


def heading(job: Job, machine: Machine) -> str:
    """Return the job and the machine as text."""
    nodes = f"{job.nodes:,} node{'s' * (job.nodes > 1)} of {job.ranks:,} rank{'s' * (job.ranks > 1)}"
    wire = str(job.codec.wire).removeprefix("torch.")
    between = f", {wire} on links of {8e-9 * machine.link:g} Gbit/s, {1e6 * machine.latency:g} us" if job.nodes > 1 else ""
    return f"{nodes}, {job.how}, a model of {size(job.model)}{between}, memory of {1e-9 * machine.memory:g} GB/s a node"


def remembered(items: dict[str, Item]) -> Iterator[str]:
    """Yield one line for each item in memory."""
    yield f"{'memory':<17}{'a rank':>12}{'a node':>12}"
    for name, item in items.items():
        yield f"{name:<17}{size(item.rank):>12}{size(item.node):>12}"
    yield f"{'together':<17}{size(sum(i.rank for i in items.values())):>12}{size(sum(i.node for i in items.values())):>12}"


def phased(found: Round) -> Iterator[str]:
    """Yield one line for each phase, then one for the round."""
    shown = [part for part in PARTS if found.spent(part)]
    yield f"{'phase':<17}{'by itself':>12}" + "".join(f"{part:>12}" for part in shown)
    for name, phase in found.phases.items():
        columns = [getattr(phase, part) for part in shown]
        yield f"{name:<17}{took(phase.seconds):>12}" + "".join(f"{took(each) if each else '':>12}" for each in columns).rstrip()
    alone = sum(phase.seconds for phase in found.phases.values())
    overlap = f"   of {took(alone)} {took(alone - found.seconds)} overlap" if alone > found.seconds * (1 + 1e-9) else ""
    yield f"{'round':<17}{took(found.seconds):>12}{overlap}"


def summary(found: Round) -> Iterator[tuple[str, str]]:
    """Yield the conclusions, as names and texts."""
    alone = sum(phase.seconds for phase in found.phases.values())
    yield "bottleneck", f"{found.bottleneck}, {took(found.spent(found.bottleneck))} of {took(alone)}"
    if not found.bound:
        yield "a node sends", "nothing"
        return
    text = f"{size(found.sent)} a round, and takes as much"
    if found.messages:
        text += f"; {found.messages:,} sends and receives, at most {found.at_once:,} at once"
    yield "a node sends", text
    yield "least", f"{took(found.bound)}, 2(N-1)/N models over the link; the round takes {ratio(found.seconds / found.bound)}"
    yield "one server", f"{took(found.star)} on the network alone, {ratio(found.star / found.seconds)} the round"
    yield (
        "Reduce and Bcast",
        f"{took(found.reduce)} on the network alone at best, {ratio(found.reduce / found.seconds)} the round",
    )


def ratio(times: float) -> str:
    """Return a ratio such as `1.03 times`."""
    return f"{times:,.2f} times" if times < 100 else f"{times:,.0f} times"


def size(count: float) -> str:
    """Return bytes with their unit: 10^3, 10^6 ..."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.4g} {name}"
    return f"{count:.0f} B"


def took(seconds: float) -> str:
    """Return a time with its unit."""
    for unit, name in ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:,.4g} {name}"
    return f"{1e6 * seconds:.3g} us"
