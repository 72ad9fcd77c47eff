"""The memory that a round needs, besides the activations and torch itself."""

from __future__ import annotations

from dataclasses import dataclass

from mpips.cli.plan.job import MODEL, Job
from mpips.comm import multi_node, reduce_scatter

SHARED = (
    "push messages",
    "weights",
    "words",
    "words",
    "words",
    "words",
    "window",
    "outbox",
)  # in the order of the `sizes` functions


@dataclass(frozen=True)
class Item:
    """Something in memory.

    Attributes:
        rank: its bytes on the rank that has most of it; memory shared by a node's ranks is divided equally.
        node: its bytes on the node that has most of it.
    """

    rank: float
    node: float


def memory(job: Job) -> dict[str, Item]:
    """Return all items in memory, without those that the plan does not have."""
    items = _shared(job) if job.size > 1 else _own(job)
    lengths = [MODEL.itemsize * count for count in job.served]
    served = Item(max(lengths), max(sum(lengths[at : at + job.ranks]) for at in range(0, job.size, job.ranks)))
    if not job.codec.exact:
        items["masters"] = served
    items["optimizer"] = Item(job.state * served.rank, job.state * served.node)
    return {name: item for name, item in items.items() if item.node}


def _shared(job: Job) -> dict[str, Item]:
    """Return the buffers that the ranks of a node share."""
    spec = job.spec
    parts = spec.sizes(job.ranks)
    if job.nodes > 1:
        own = reduce_scatter.sizes(spec, job.ranks, job.nodes, job.bucket)
        parts = own if job.sharded else multi_node.sizes(spec, job.ranks)
    items = {name: Item(0, 0) for name in SHARED}
    for name, part in zip(SHARED, parts, strict=False):
        items[name] = Item(items[name].rank + part / job.ranks, items[name].node + part)
    words = items["words"]  # reports, decision, the reduced tail; and each rank's copy of that
    return items | {"words": Item(words.rank + job.tail, words.node + job.tail * job.ranks)}


def _own(job: Job) -> dict[str, Item]:
    """Return each rank's own messages."""
    push, pull = job.model + job.tail, job.spec.pull
    return {"push messages": Item(push, push * job.ranks), "weights": Item(pull, pull * job.ranks)}
