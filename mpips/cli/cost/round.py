"""The seconds of a round, phase by phase.

Between nodes it is followed step by step as in `ReduceScatterGroup._travel`: while some steps travel the next is added up and
one that has come is joined; whoever is done first waits. A link carries steps one after the other; nothing but the last byte
waits for the latency. Within a node all ranks that work do so at once, each as fast as its part of the memory is. What stays
in a core's cache is free.

Not in it: barriers of a node's ranks (some us each), what the network's card takes of the memory, other traffic on the links,
ranks that come late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mpips.cli.cost.job import MODEL, Job, Machine
from mpips.cli.cost.schedule import Schedule, schedule
from mpips.comm import pieces
from mpips.model.layout import BUCKET, FLIGHT

PARTS = ("network", "memory", "latency", "posting", "step")


@dataclass(frozen=True)
class Phase:
    """What a phase takes by itself, in seconds.

    Attributes:
        network: bytes on the busiest link.
        memory: reading and writing.
        latency: of messages.
        posting: by which a leader begins to send and to receive.
        step: the optimizer's reading and writing.
    """

    network: float = 0.0
    memory: float = 0.0
    latency: float = 0.0
    posting: float = 0.0
    step: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        return self.network + self.memory + self.latency + self.posting + self.step


@dataclass(frozen=True)
class Round:
    """A round.

    Attributes:
        phases: what each takes by itself.
        seconds: of the round, in which some overlap.
        push, pull: of that, from the first slice that is sent until the last is there, and joined.
        sent: bytes that the busiest node sends, and takes.
        messages: that a node posts, sends and receives, slices alone.
        at_once: the most of them that are posted before one is waited for.
        bound: the least seconds in which so many bytes can travel; 0 where nothing does.
        star, reduce: seconds on the network of one server that everybody sends to, and of the best Reduce and Bcast.
    """

    phases: dict[str, Phase]
    seconds: float
    push: float = 0.0
    pull: float = 0.0
    sent: float = 0.0
    messages: int = 0
    at_once: int = 0
    bound: float = 0.0
    star: float = 0.0
    reduce: float = 0.0

    @property
    def bottleneck(self) -> str:
        """What most of the phases' own seconds go to."""
        return max(PARTS, key=self.spent)

    def spent(self, part: str) -> float:
        """The seconds of all phases that go to one part of the machine."""
        return float(sum(getattr(phase, part) for phase in self.phases.values()))


@dataclass
class Travel:
    """Steps that travel one after the other; times of the busiest node, in seconds.

    Attributes:
        before, after: work on the step, on this side and on the other; 0 everywhere where there is none.
        posting: until all its messages are posted.
        bytes: on the link.
    """

    before: list[float] = field(default_factory=list)
    posting: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def add(self, before: float, posting: float, bytes: float, after: float) -> None:
        """One more step."""
        for values, value in zip(vars(self).values(), (before, posting, bytes, after), strict=True):
            values.append(value)

    def pipelined(self, latency: float, flight: int = FLIGHT) -> float:
        """Until the last step is joined: as in `ReduceScatterGroup._travel`, so many are under way while one is waited for."""
        now = free = 0.0
        there: list[float] = []
        for number in range(len(self.bytes) + flight):
            if number < len(self.bytes):
                now += self.before[number]
                free = max(free, now) + self.bytes[number]
                now += self.posting[number]
                there.append(max(free, now) + latency)
            if 0 <= number - flight < len(self.bytes):
                now = max(now, there[number - flight]) + self.after[number - flight]
        return now

    def together(self, latency: float) -> float:
        """All are posted, then waited for."""
        now = free = 0.0
        for posting, bytes in zip(self.posting, self.bytes, strict=True):
            free = max(free, now) + bytes
            now += posting
        return max(free, now) + latency if self.bytes else 0.0


def predict(job: Job, machine: Machine) -> Round:
    """One round of it."""
    if job.how == "rooms, sharded":
        return _sharded(job, machine, schedule(job))
    return _root(job, machine) if job.how == "rooms, root" else _one_node(job, machine)


def _one_node(job: Job, machine: Machine) -> Round:
    """In shared memory, or in one process: nothing is sent."""
    adding = job.model * _passes(job.ranks) / (machine.memory if job.sharded else _alone(job, machine))
    phases = {"adding up": Phase(memory=adding)} if job.size > 1 else {}
    phases["step"] = Phase(step=_step(job, machine))
    return Round(phases, sum(phase.seconds for phase in phases.values()))


def _root(job: Job, machine: Machine) -> Round:
    """Reduce and Bcast of the leaders by the best algorithms there are: the server's link carries three parts of four."""
    link, depth, share = machine.link, math.ceil(math.log2(job.nodes)), (job.nodes - 1) / job.nodes
    buckets = len(list(pieces(job.model, 1, min(job.bucket, BUCKET))))
    speed = machine.memory * job.hands / job.ranks if buckets > 1 else _alone(job, machine)
    calls = buckets + (buckets > 1)  # one bucket takes the tail along
    phases = {
        "adding up": Phase(memory=(job.model * _passes(job.ranks)) / speed),
        "reduce": Phase(network=2 * share * (job.model + job.tail) / link, latency=2 * depth * machine.latency * calls),
        "step": Phase(step=_step(job, machine)),
        "bcast": Phase(network=2 * share * job.contents.pull / link, latency=2 * depth * machine.latency),
    }
    sent = share * (job.model + job.tail + 2 * job.contents.pull)
    return _compared(job, machine, Round(phases, sum(phase.seconds for phase in phases.values()), sent=sent))


def _sharded(job: Job, machine: Machine, plan: Schedule) -> Round:
    """Slices between the leaders of several nodes."""
    push, pull = _push(job, machine, plan), _pull(job, machine, plan)
    rounded = job.travels != MODEL
    pushing = push.pipelined(machine.latency)
    pulling = pull.pipelined(machine.latency) if rounded else pull.together(machine.latency)
    around = {
        "tails": _tails(job, machine),
        "report, verdict": _words(job, machine, 8 * job.contents.lines),
        "step": Phase(step=_step(job, machine)),
        "control": _words(job, machine, 0),
    }
    steps = len(plan.parts)
    phases = {
        "tails": around["tails"],
        "adding up": Phase(memory=sum(push.before)),
        "reduce-scatter": Phase(network=sum(push.bytes), latency=steps * machine.latency, posting=sum(push.posting)),
        "joining": Phase(memory=sum(push.after)),
        "report, verdict": around["report, verdict"],
        "step": around["step"],
        "control": around["control"],
        "changes": Phase(memory=sum(pull.before)),
        "allgather": Phase(
            network=sum(pull.bytes),
            latency=(steps if rounded else bool(steps)) * machine.latency,
            posting=sum(pull.posting),
        ),
        "following": Phase(memory=sum(pull.after)),
    }
    posted = [max(count for _, _, count in plan.sums(step)) for step in range(steps)]
    together = max((sum(posted[at : at + FLIGHT + 1]) for at in range(steps)), default=0)
    return _compared(
        job,
        machine,
        Round(
            {name: phase for name, phase in phases.items() if phase.seconds},
            seconds=pushing + pulling + sum(phase.seconds for phase in around.values()),
            push=pushing,
            pull=pulling,
            sent=max(plan.sent()),
            messages=2 * max(sum(plan.sums(step)[kind][2] for step in range(steps)) for kind in range(len(plan.counts))),
            at_once=together if rounded else max(together, sum(posted)),
        ),
    )


def _push(job: Job, machine: Machine, plan: Schedule) -> Travel:
    """Added up, sent, joined with what comes."""
    travel, speed = Travel(), machine.memory * job.hands / job.ranks
    for step in plan.pushed:
        part = plan.parts[step]
        sums = plan.sums(step)
        elements = sum(count * each for count, each in zip(plan.counts, part, strict=True)) // plan.itemsize
        added = elements * (MODEL.itemsize * _passes(job.ranks) + (plan.itemsize if job.travels != MODEL else 0))
        joined = max(part) // plan.itemsize * ((job.nodes - 1) * plan.itemsize + 2 * MODEL.itemsize)
        travel.add(added / speed, _posting(machine, sums), _bytes(machine, sums), joined / speed)
    return travel


def _pull(job: Job, machine: Machine, plan: Schedule) -> Travel:
    """Stepped, sent; if it is changes that are sent, they are made and followed."""
    travel, rounded, speed = Travel(), job.travels != MODEL, machine.memory * job.hands / job.ranks
    for step in range(len(plan.parts)):
        sums = plan.sums(step)
        made = max(plan.widest[step]) * (3 * MODEL.itemsize + plan.itemsize)  # from masters and weights, to weights and outbox
        others = max(theirs for theirs, _, _ in sums) // plan.itemsize
        followed = others * (2 * MODEL.itemsize + plan.itemsize)
        travel.add(
            made / _alone(job, machine) if rounded else 0.0,
            _posting(machine, sums),
            _bytes(machine, sums),
            followed / speed if rounded else 0.0,
        )
    return travel


def _posting(machine: Machine, sums: Sequence[tuple[int, int, int]]) -> float:
    return max(count for _, _, count in sums) * machine.message


def _bytes(machine: Machine, sums: Sequence[tuple[int, int, int]]) -> float:
    """On the busiest link, in the direction that has more."""
    return max(max(theirs, mine) for theirs, mine, _ in sums) / machine.link


def _tails(job: Job, machine: Machine) -> Phase:
    """Added by the leader, then by all leaders in an Allreduce."""
    share, depth = (job.nodes - 1) / job.nodes, math.ceil(math.log2(job.nodes))  # of the best algorithms
    read = job.ranks * job.tail / _alone(job, machine)
    return Phase(network=2 * share * job.tail / machine.link, memory=read, latency=2 * depth * machine.latency)


def _words(job: Job, machine: Machine, numbers: int) -> Phase:
    """Two collective calls of the leaders, of so many bytes: a Reduce and a Bcast, or two of the latter."""
    depth = math.ceil(math.log2(job.nodes))
    return Phase(network=2 * (job.nodes - 1) / job.nodes * numbers / machine.link, latency=2 * depth * machine.latency)


def _step(job: Job, machine: Machine) -> float:
    """The rank with the longest slice reads gradients, reads and writes weights and the optimizer's state."""
    longest = max(job.served)
    return float(longest) * MODEL.itemsize * (3 + 2 * job.state) / _alone(job, machine)


def _alone(job: Job, machine: Machine) -> float:
    """Bytes a second of one rank."""
    return machine.memory / job.ranks


def _passes(ranks: int) -> int:
    """How often a node's memory is passed over to add up: each row is read; one is written, too, if there are several."""
    return ranks + (ranks > 1)


def _compared(job: Job, machine: Machine, found: Round) -> Round:
    """With the bound for N nodes, and with what needs one server."""
    model, wire = job.model, job.numel * job.travels.itemsize
    share, depth = (job.nodes - 1) / job.nodes, math.log2(job.size)
    return replace(
        found,
        bound=2 * share * wire / machine.link,
        star=2 * (job.nodes - 1) * job.ranks * model / machine.link,
        reduce=4 * share * model / machine.link + 4 * depth * machine.latency,
    )
