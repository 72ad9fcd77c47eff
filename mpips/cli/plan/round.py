"""The seconds of a round, phase by phase.

Between nodes the round is followed step by step as in `ReduceScatterGroup._pipeline`: while some steps travel, the ranks add
the next one and join one that has arrived; whichever finishes first waits. A link carries steps one after another; only the
last byte pays the latency. Within a node all ranks work at the same time, each with its share of the memory bandwidth. Data in
a core's cache is free.

Not included: barriers within a node (some us each), the network card's memory traffic, other traffic on the links, late ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mpips.cli.plan.job import MODEL, Job, Machine
from mpips.cli.plan.schedule import Schedule, schedule
from mpips.comm import pieces
from mpips.model.layout import BUCKET, FLIGHT

PARTS = ("network", "memory", "latency", "posting", "step")


@dataclass(frozen=True)
class Phase:
    """What a phase takes without overlap, in seconds.

    Attributes:
        network: bytes on the busiest link.
        memory: reading and writing memory.
        latency: of messages.
        posting: a leader's starting of sends and receives.
        step: the optimizer's reading and writing.
    """

    network: float = 0.0
    memory: float = 0.0
    latency: float = 0.0
    posting: float = 0.0
    step: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return self.network + self.memory + self.latency + self.posting + self.step


@dataclass(frozen=True)
class Round:
    """The prediction for a round.

    Attributes:
        phases: what each phase takes without overlap.
        seconds: the time of the round, in which phases overlap.
        push, pull: the part of it from the first slice that is sent until the last has arrived and been joined.
        sent: the bytes that the busiest node sends, which equal those that it receives.
        messages: the sends and receives that a node posts for slices.
        at_once: the largest number of these that are posted at the same time.
        bound: the least seconds in which these bytes can travel; 0 if nothing travels.
        star, reduce: the seconds on the network for one server that all send to, and for the best Reduce and Bcast.
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
        """The part of the machine on which the phases spend the most time."""
        return max(PARTS, key=self.spent)

    def spent(self, part: str) -> float:
        """Return the seconds that all phases spend on one part of the machine."""
        return float(sum(getattr(phase, part) for phase in self.phases.values()))


@dataclass
class Travel:
    """Steps that travel one after another; times of the busiest node, in seconds.

    Attributes:
        before, after: the work on the step before it is sent, and after it has arrived.
        posting: the time to post all its messages.
        bytes: the time on the link.
    """

    before: list[float] = field(default_factory=list)
    posting: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def add(self, before: float, posting: float, bytes: float, after: float) -> None:
        """Add a step."""
        for values, value in zip(vars(self).values(), (before, posting, bytes, after), strict=True):
            values.append(value)

    def pipelined(self, latency: float, flight: int = FLIGHT) -> float:
        """Return the time until the last step is joined, with up to `flight` further steps under way while one is awaited.

        This follows `ReduceScatterGroup._pipeline`.
        """
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
        """Return the time if all steps are posted first, and then awaited."""
        now = free = 0.0
        for posting, bytes in zip(self.posting, self.bytes, strict=True):
            free = max(free, now) + bytes
            now += posting
        return max(free, now) + latency if self.bytes else 0.0


def predict(job: Job, machine: Machine) -> Round:
    """Return the prediction for a round of the job on the machine."""
    if job.how == "between nodes, sharded":
        return _sharded(job, machine, schedule(job))
    return _root(job, machine) if job.how == "between nodes, root" else _one_node(job, machine)


def _one_node(job: Job, machine: Machine) -> Round:
    """Predict a round in shared memory or in one process, where nothing is sent."""
    adding = job.model * _passes(job.ranks) / (machine.memory if job.sharded else _alone(job, machine))
    phases = {"adding up": Phase(memory=adding)} if job.size > 1 else {}
    phases["step"] = Phase(step=_step(job, machine))
    return Round(phases, sum(phase.seconds for phase in phases.values()))


def _root(job: Job, machine: Machine) -> Round:
    """Predict a round with a Reduce and a Bcast of the leaders by optimal algorithms.

    Such a Reduce is a reduce-scatter and a gather, such a Bcast a scatter and an allgather. The server's link carries data in
    three of these four.
    """
    link, depth, share = machine.link, math.ceil(math.log2(job.nodes)), (job.nodes - 1) / job.nodes
    buckets = len(list(pieces(job.model, 1, min(job.bucket, BUCKET))))
    speed = machine.memory * job.hands / job.ranks if buckets > 1 else _alone(job, machine)
    calls = buckets + (buckets > 1)  # a single bucket includes the tail
    phases = {
        "adding up": Phase(memory=(job.model * _passes(job.ranks)) / speed),
        "reduce": Phase(network=2 * share * (job.model + job.tail) / link, latency=2 * depth * machine.latency * calls),
        "step": Phase(step=_step(job, machine)),
        "bcast": Phase(network=2 * share * job.spec.pull / link, latency=2 * depth * machine.latency),
    }
    sent = share * (job.model + job.tail + 2 * job.spec.pull)
    return _compared(job, machine, Round(phases, sum(phase.seconds for phase in phases.values()), sent=sent))


def _sharded(job: Job, machine: Machine, plan: Schedule) -> Round:
    """Predict a round with a reduce-scatter and an allgather between the leaders of several nodes."""
    push, pull = _push(job, machine, plan), _pull(job, machine, plan)
    rounded = not job.codec.exact
    pushing = push.pipelined(machine.latency)
    pulling = pull.pipelined(machine.latency) if rounded else pull.together(machine.latency)
    around = {
        "tails": _tails(job, machine),
        "report, verdict": _words(job, machine, 8 * job.spec.lines),
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
    """Return the steps of the push: slices are added, sent, and joined with those that arrive."""
    travel, speed = Travel(), machine.memory * job.hands / job.ranks
    for step in plan.pushed:
        part = plan.parts[step]
        sums = plan.sums(step)
        elements = sum(count * each for count, each in zip(plan.counts, part, strict=True)) // plan.itemsize
        added = elements * (MODEL.itemsize * _passes(job.ranks) + (plan.itemsize if not job.codec.exact else 0))
        joined = max(part) // plan.itemsize * ((job.nodes - 1) * plan.itemsize + 2 * MODEL.itemsize)
        travel.add(added / speed, _posting(machine, sums), _bytes(machine, sums), joined / speed)
    return travel


def _pull(job: Job, machine: Machine, plan: Schedule) -> Travel:
    """Return the steps of the pull: stepped slices are sent. With a rounded dtype, changes are computed, sent and applied."""
    travel, rounded, speed = Travel(), not job.codec.exact, machine.memory * job.hands / job.ranks
    for step in range(len(plan.parts)):
        sums = plan.sums(step)
        computed = max(plan.widest[step]) * (
            3 * MODEL.itemsize + plan.itemsize
        )  # reads masters and weights, writes weights and outbox
        others = max(their_bytes for their_bytes, _, _ in sums) // plan.itemsize
        followed = others * (2 * MODEL.itemsize + plan.itemsize)
        travel.add(
            computed / _alone(job, machine) if rounded else 0.0,
            _posting(machine, sums),
            _bytes(machine, sums),
            followed / speed if rounded else 0.0,
        )
    return travel


def _posting(machine: Machine, sums: Sequence[tuple[int, int, int]]) -> float:
    """Return the seconds to post the messages of a step."""
    return max(count for _, _, count in sums) * machine.message


def _bytes(machine: Machine, sums: Sequence[tuple[int, int, int]]) -> float:
    """Return the seconds of a step on the busiest link, in its busier direction."""
    return max(max(others, own) for others, own, _ in sums) / machine.link


def _tails(job: Job, machine: Machine) -> Phase:
    """Predict the reduction of the tails: first by each leader, then by an Allreduce of the leaders."""
    share, depth = (job.nodes - 1) / job.nodes, math.ceil(math.log2(job.nodes))  # of optimal algorithms
    read = job.ranks * job.tail / _alone(job, machine)
    return Phase(network=2 * share * job.tail / machine.link, memory=read, latency=2 * depth * machine.latency)


def _words(job: Job, machine: Machine, numbers: int) -> Phase:
    """Predict two collective calls of the leaders with this many bytes: a Reduce and a Bcast, or two Bcasts."""
    depth = math.ceil(math.log2(job.nodes))
    return Phase(network=2 * (job.nodes - 1) / job.nodes * numbers / machine.link, latency=2 * depth * machine.latency)


def _step(job: Job, machine: Machine) -> float:
    """Return the seconds of the optimizer on the longest slice: gradients are read, weights and state read and written."""
    longest = max(job.served)
    return float(longest) * MODEL.itemsize * (3 + 2 * job.state) / _alone(job, machine)


def _alone(job: Job, machine: Machine) -> float:
    """Return the memory bandwidth of one rank, in bytes per second."""
    return machine.memory / job.ranks


def _passes(ranks: int) -> int:
    """Return how many passes over memory a sum takes: every row is read, and one is written if there are several."""
    return ranks + (ranks > 1)


def _compared(job: Job, machine: Machine, found: Round) -> Round:
    """Return the prediction with the lower bound for N nodes, and the times of designs with one server."""
    model, wire = job.model, job.codec.bytes(job.numel)
    share, depth = (job.nodes - 1) / job.nodes, math.log2(job.size)
    return replace(
        found,
        bound=2 * share * wire / machine.link,
        star=2 * (job.nodes - 1) * job.ranks * model / machine.link,
        reduce=4 * share * model / machine.link + 4 * depth * machine.latency,
    )
