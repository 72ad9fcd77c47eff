"""What `mpips plan` predicts: the schedule is what node groups post, the memory what they ask for, the seconds what follows."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpips.cli import main as cli
from mpips.cli import plan
from mpips.cli.plan import Job, Machine, Phase, memory, predict, schedule
from mpips.cli.plan.round import Travel
from mpips.comm import reduce_scatter as sharded
from mpips.comm import simulated
from mpips.comm.node_group import BufferSpec
from mpips.comm.reduce_scatter import sizes
from mpips.comm.simulated import SimulatedCommunicator, World
from mpips.comm.simulated_group import SimulatedLeaderGroup
from mpips.model import layout
from mpips.model.flat import lay_out
from mpips.model.layout import FLIGHT, GRAIN, SMALL
from mpips.reduce import choice
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from tests.conftest import ROOT, run
from tests.helpers.programs import data, mlp, train

WIRES = pytest.mark.parametrize("wire", ["full", "bfloat16"])
SHAPES = pytest.mark.parametrize(("nodes", "ranks"), [(2, 1), (2, 2), (3, 1), (4, 3), (5, 2)])
FAST = Machine(message=0.0, memory=math.inf)  # all but the network is free


def odd(nodes: int, ranks: int, **settings: Any) -> Job:
    """A model of several tensors that nothing divides."""
    slots, numel = lay_out([(str(n), torch.empty(n, device="meta")) for n in (1, 700, 333, 90, 2500, 5, 1111)])
    return Job(nodes, ranks, numel, slots, **{"plan": "sharded", "bucket": 700, **settings})


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model is cut up, and travels, as a large one would."""
    monkeypatch.setattr(layout, "GRAIN", 64)
    monkeypatch.setattr(layout.pieces, "__defaults__", (256,))
    monkeypatch.setattr(sharded, "LEAST", 1)


# The schedule


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 1), (4, 8), (8, 1), (64, 16), (2048, 8)])
@WIRES
def test_even_slices_send_the_least_that_n_nodes_must(nodes: int, ranks: int, wire: Any) -> None:
    job = Job.of(nodes, ranks, 4 * nodes * ranks * GRAIN * 20, comm_dtype=wire, plan="sharded")
    found = predict(job, Machine())
    least = 2 * (nodes - 1) * job.numel // nodes * job.codec.bytes(1)
    assert schedule(job).sent() == [least]
    assert found.sent == least
    assert found.bound == pytest.approx(least / Machine().link)


@SHAPES
@WIRES
@pytest.mark.usefixtures("small_steps")
def test_what_is_sent_is_taken_and_the_body_travels_once(nodes: int, ranks: int, wire: Any) -> None:
    job = odd(nodes, ranks, comm_dtype=wire)
    found = schedule(job)
    assert len(found.parts) > FLIGHT + 1
    sent, taken = Counter[int](), Counter[int]()
    for step in range(len(found.parts)):
        for way in ("push", "pull"):
            posted = [found.messages(way, step, node) for node in range(nodes)]
            there = {(node, other, count) for node in range(nodes) for other, count in posted[node][0]}
            assert there == {(other, node, count) for node in range(nodes) for other, count in posted[node][1]}
            for node, both in enumerate(posted):
                sent[node] += sum(count for _, count in both[0])
                taken[node] += sum(count for _, count in both[1])
                theirs, mine, count = found.sums(found.pushed[step] if way == "push" else step)[found.kinds[node]]
                assert sum(map(len, both)) == count
                assert [sum(c for _, c in part) for part in both] == ([theirs, mine] if way == "push" else [mine, theirs])
    assert sent == taken == {node: found.sent()[found.kinds[node]] for node in range(nodes)}
    whole = job.numel * job.codec.bytes(1)
    assert sum(sent.values()) == 2 * (nodes - 1) * whole
    assert sum(found.parts[step][kind] for step in range(len(found.parts)) for kind in found.kinds) == whole


class Nothing:
    """Work that leaves everything as it is, and remembers who did it."""

    def __init__(self) -> None:
        self.parts: list[slice] = []

    def reduce_local(self, part: slice, rows: Sequence[Tensor]) -> None:
        self.parts.append(part)

    def reduce_remote(self, part: slice, sums: Sequence[Tensor]) -> None:
        self.parts.append(part)

    def finalize(self, part: slice, total: Tensor) -> None:
        pass


Posted = dict[int, list[list[list[tuple[int, int]]]]]
Made = dict[str, int]


def really(job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[Posted, Made, list[bool]]:
    """What each node posts in a round of simulated node groups, the bytes of what is in one, and which ranks add."""
    posted: Posted = {node: [] for node in range(job.nodes)}
    made: Made = {}
    swap = SimulatedLeaderGroup.sendrecv

    def seen(self: SimulatedLeaderGroup, sent: Any, taken: Any) -> Any:
        posted[self.node].append([[(node, part.nbytes) for node, part in way] for way in (sent, taken)])
        return swap(self, sent, taken)

    class Counted(sharded.ReduceScatterGroup):
        def __init__(self, nodes: Any, rank: int, buffers: Any, parts: Any, *others: Any) -> None:
            super().__init__(nodes, rank, buffers, parts, *others)
            made["together"] = spec.row * len(buffers.rows) + sum(part.nbytes for part in [buffers.pull, *parts])
            made.update({"weights": buffers.pull.nbytes, "window": self._window.nbytes, "outbox": self._outbox.nbytes})

    monkeypatch.setattr(SimulatedLeaderGroup, "sendrecv", seen)
    monkeypatch.setattr(simulated, "ReduceScatterGroup", Counted)
    spec = job.spec

    def program(e: SimulatedCommunicator) -> bool:
        group, work = e.node_group(spec), Nothing()
        assert group
        group.serve(job.buckets, slice(job.numel, job.numel))
        group.reduce(1.0, torch.zeros(spec.numel - spec.tail), work)
        group.report(torch.zeros(spec.lines, dtype=torch.float64), "min")
        group.decide(torch.zeros(spec.answer, dtype=torch.float64))
        group.broadcast(lambda: None)
        return bool(work.parts)

    worked = World(job.size, shares=True, nodes=[job.ranks] * job.nodes, bucket=job.bucket).run(program)
    return posted, made, worked


@SHAPES
@WIRES
@pytest.mark.usefixtures("small_steps")
def test_it_is_what_node_groups_post(nodes: int, ranks: int, wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = odd(nodes, ranks, comm_dtype=wire)
    found = schedule(job)
    posted, made, worked = really(job, monkeypatch)
    for node in range(nodes):
        ways = [("push", step) for step in range(len(found.parts))] + [("pull", step) for step in range(len(found.parts))]
        assert posted[node] == [list(found.messages(way, step, node)) for way, step in ways]  # type: ignore[arg-type]
    assert predict(job, Machine()).messages == max(
        sum(len(way) for step in posted[node] for way in step) for node in range(nodes)
    )
    items = memory(job)
    shared = sum(items[name].node for name in ("push messages", "weights", "words", "window", "outbox") if name in items)
    assert shared - ranks * job.tail == made["together"] == sum(sizes(job.spec, ranks, nodes, job.bucket))
    for name in ("weights", "window", "outbox"):
        assert made[name] == (items[name].node if name in items else 0)
    assert sum(worked) == nodes * job.hands


@pytest.mark.usefixtures("small_steps")
def test_small_models_leave_some_nodes_without_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, numel = lay_out([("one", torch.empty(130, device="meta"))])
    job = Job(6, 1, numel, slots, plan="sharded")
    found = schedule(job)
    assert 0 in found.parts[0]
    posted, _, _ = really(job, monkeypatch)
    for node in range(6):
        ways = [found.messages("push", 0, node), found.messages("pull", 0, node)]
        assert posted[node] == [list(way) for way in ways]


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("chosen", ["auto", "root", "sharded"])
@pytest.mark.parametrize("larger", [False, True])
@WIRES
def test_a_run_asks_for_the_same(
    nodes: int, chosen: Any, larger: bool, wire: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[BufferSpec] = []
    dealt: dict[int, list[slice]] = {}
    slots, numel = lay_out(mlp().named_parameters())
    for module in (choice, plan.job):
        monkeypatch.setattr(module, "SMALL", 4 * numel - larger)
    job = Job(nodes, 2, numel, slots, plan=chosen, comm_dtype=wire)
    group, deal = SimulatedCommunicator.node_group, choice.deal

    def asking(self: SimulatedCommunicator, spec: BufferSpec) -> Any:
        asked.append(spec)
        return group(self, spec)

    def dealing(group: Any, *others: Any) -> None:
        deal(group, *others)
        dealt[group.rank] = group.slices

    monkeypatch.setattr(SimulatedCommunicator, "node_group", asking)
    monkeypatch.setattr(choice, "deal", dealing)

    def program(e: SimulatedCommunicator) -> bool:
        settings: Any = {"plan": chosen, "comm_dtype": wire, "run_dir": str(tmp_path)}
        ps = train(e, mlp(), lambda params: torch.optim.Adam(params), data(20), **settings)
        return isinstance(ps._worker.server.transport, SharedMemoryTransport)

    assert World(job.size, shares=True, nodes=[2] * nodes).run(program) == [True] * (job.size - 1)
    fields = {**vars(job.spec), "answer": 0}
    for spec in asked:
        assert {**vars(spec), "answer": 0, "codec": fields["codec"] if nodes == 1 else spec.codec} == fields
    assert [dealt[rank] for rank in range(job.size)] == [list(own) for own in zip(*job.buckets, strict=True)]


# The seconds


def test_three_steps_by_hand() -> None:
    """One under way while one is waited for: add 1, travel 2, join 1; half a second of latency."""
    travel = Travel()
    for _ in range(3):
        travel.add(1.0, 0.0, 2.0, 1.0)
    # at 1 the first is posted; at 2 the second, which travels from 3 to 5; at 3.5 the first is there, and joined until 4.5
    # at 5.5 the third is posted, and the second there, joined until 6.5; at 8 the third is there, joined until 9
    assert travel.pipelined(0.5, flight=1) == 9.0
    assert travel.pipelined(0.5, flight=3) == 1 + 6 + 0.5 + 1  # the line is never idle
    assert travel.together(0.5) == 6.5


def test_posting_keeps_the_line_idle_only_if_it_takes_longer() -> None:
    slow, quick = Travel(), Travel()
    for _ in range(4):
        slow.add(0.0, 3.0, 1.0, 0.0)
        quick.add(0.0, 0.5, 1.0, 0.0)
    assert (slow.pipelined(0.0), slow.together(0.0)) == (12.0, 12.0)
    assert (quick.pipelined(0.0), quick.together(0.0)) == (4.0, 4.0)


@pytest.mark.parametrize("nodes", [2, 8, 64, 2048])
@WIRES
def test_on_the_network_alone_it_is_the_bound_and_some_latencies(nodes: int, wire: Any) -> None:
    job = Job.of(nodes, 8, 4e9, comm_dtype=wire)
    found = predict(job, FAST)
    assert found.bound < found.push + found.pull < 1.03 * found.bound
    assert found.bottleneck == "network"


def test_it_takes_longer_the_worse_the_machine_and_the_larger_the_model() -> None:
    job, machine = Job.of(16, 4, 1e8), Machine()
    for wire in ("full", "bfloat16"):
        base = predict(replace(job, comm_dtype=wire), machine).seconds
        for worse in (
            replace(machine, link=machine.link / 2),
            replace(machine, latency=machine.latency * 50),
            replace(machine, message=machine.message * 10),
            replace(machine, memory=machine.memory / 2),
        ):
            assert predict(replace(job, comm_dtype=wire), worse).seconds > base
        assert predict(replace(job, comm_dtype=wire, state=5), machine).seconds > base
        assert predict(Job.of(16, 4, 2e8, comm_dtype=wire), machine).seconds > base
    assert predict(replace(job, comm_dtype="bfloat16"), FAST).seconds < predict(job, FAST).seconds


@pytest.mark.parametrize(
    ("machine", "part"),
    [
        (Machine(link=1e8), "network"),
        (Machine(memory=1e9), "memory"),
        (Machine(latency=1.0), "latency"),
        (Machine(message=1.0), "posting"),
    ],
)
def test_the_bottleneck_is_what_is_slow(machine: Machine, part: str) -> None:
    assert predict(Job.of(8, 2, 1e8), machine).bottleneck == part


def test_much_state_makes_the_step_the_bottleneck() -> None:
    assert predict(Job.of(1, 2, 1e8, state=50), Machine()).bottleneck == "step"


def test_on_one_node_nothing_is_sent() -> None:
    job = Job.of(1, 4, 1e8)
    found = predict(job, Machine(memory=1e11))
    assert (found.sent, found.messages, found.bound, found.star) == (0, 0, 0, 0)
    assert found.phases["adding up"] == Phase(memory=pytest.approx(5 * job.model / 1e11))
    assert found.phases["step"] == Phase(step=pytest.approx(7 * job.model / 1e11, rel=1e-3))
    alone = predict(replace(job, plan="root"), Machine(memory=1e11))
    assert alone.seconds == pytest.approx(4 * found.seconds, rel=1e-3)
    one = predict(Job.of(1, 1, 1e8), Machine())
    assert list(one.phases) == ["step"]


def test_the_server_serves_small_models_and_plan_root() -> None:
    assert Job.of(4, 2, SMALL).how == "between nodes, root"
    assert Job.of(4, 2, SMALL + 64).how == "between nodes, sharded"
    job = Job.of(4, 2, 1e9, plan="root")
    found = predict(job, Machine())
    assert job.how == "between nodes, root"
    assert found.seconds > 2 * predict(Job.of(4, 2, 1e9), Machine()).seconds
    assert found.reduce == pytest.approx(2 * found.bound, rel=1e-3)
    assert memory(job)["optimizer"].rank == 2 * job.model
    assert memory(job)["push messages"].rank == pytest.approx(1e9, rel=1e-4)


def test_what_one_server_would_take() -> None:
    found = predict(Job.of(64, 1, 1e8), Machine())
    assert found.star == pytest.approx(126 * 4e-3)  # 2(n-1) M/B
    assert found.reduce == pytest.approx(3.94 * 4e-3, rel=0.01)  # 4(n-1)/n M/B and 4 log2(n) latencies


def test_16384_ranks_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []
    monkeypatch.setattr(layout, "_cut", lambda slots, at, tensors, cut=layout._cut: cuts.append(at) or cut(slots, at, tensors))
    job = Job.of(2048, 8, 1.4e10)
    found = predict(job, Machine())
    assert len(cuts) < (len(job.buckets) + 1) * job.size  # it takes seconds, of which this is the most
    assert found.bound == pytest.approx(2 * 2047 / 2048 * job.model / 25e9)
    assert len(schedule(job).counts) < 10
    assert sum(schedule(job).counts) == 2048
    rank = sum(item.rank for item in memory(job).values())
    assert 1.1 * job.model < rank < 1.3 * job.model  # the gradient, and an eighth of the weights


# The verb

WORDS = ["plan", "--nodes", "64", "--ranks-per-node", "8", "--model-mb", "100", "--gbit", "200"]


def test_the_verb_prints_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(WORDS) == 0
    text = capsys.readouterr().out
    job, machine = Job.of(64, 8, 1e8), Machine()
    assert text == plan.table(job, machine, predict(job, machine)) + "\n"
    for words in ("64 nodes of 8 ranks, between nodes", "push messages", "window", "allgather", "bottleneck", "one server"):
        assert words in text
    assert "504 ms" not in text  # eight workers a node send more than one
    assert max(map(len, text.splitlines())) < 140


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--comm-dtype",
        "bfloat16",
        "--latency-us",
        "5",
        "--message-us",
        "0",
        "--memory-gbs",
        "100",
        "--optimizer-floats",
        "1",
    ]
    assert cli.main([*WORDS, *more, "--bucket-cap-mb", "2", "--plan", "sharded", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    job = Job.of(64, 8, 1e8, plan="sharded", comm_dtype="bfloat16", bucket=2_000_000, state=1.0)
    found = predict(job, Machine(25e9, 5e-6, 0.0, 1e11))
    assert facts["seconds"] == pytest.approx(found.seconds)
    assert facts["ratio"] == pytest.approx(found.seconds / found.bound)
    assert facts["memory"]["masters"]["node"] == memory(job)["masters"].node
    assert (facts["wire"], facts["how"], facts["bottleneck"]) == ("bfloat16", "between nodes, sharded", found.bottleneck)


@pytest.mark.parametrize("size", ["1", "0.00001", "1000"])
@pytest.mark.parametrize(("nodes", "ranks"), [("1", "1"), ("1", "8"), ("2", "1"), ("300", "3")])
def test_every_plan_can_be_shown(nodes: str, ranks: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--nodes", nodes, "--ranks-per-node", ranks, "--model-mb", size, "--gbit", "1", "--latency-us", "0"]
    for more in ([], ["--plan", "root"], ["--plan", "sharded", "--comm-dtype", "bfloat16"]):
        assert cli.main([*words, *more]) == 0
        assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--nodes": "0"}, ["--nodes", "'0'", "at least 1"]),
        ({"--nodes": "many"}, ["--nodes", "'many'", "at least 1"]),
        ({"--ranks-per-node": "-8"}, ["--ranks-per-node", "'-8'", "at least 1"]),
        ({"--nodes": "1000000"}, ["--nodes", "1000000 x 8", "1,000,000 ranks"]),
        ({"--model-mb": "0"}, ["--model-mb", "'0'", "a number from"]),
        ({"--gbit": "nan"}, ["--gbit", "'nan'", "a number from"]),
        ({"--gbit": "fast"}, ["--gbit", "'fast'", "a number from"]),
        ({"--latency-us": "-1"}, ["--latency-us", "'-1'", "a number from 0"]),
        ({"--memory-gbs": "0"}, ["--memory-gbs", "'0'", "a number from"]),
        ({"--comm-dtype": "int8"}, ["--comm-dtype", "'int8'", "bfloat16"]),
        ({"--plan": "best"}, ["--plan", "'best'", "sharded"]),
        ({"--nodes": None}, ["--nodes", "required"]),
    ],
)
def test_bad_numbers_are_one_line(changed: dict[str, str | None], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = {**dict(zip(WORDS[1::2], WORDS[2::2], strict=True)), **changed}
    try:
        status = cli.main(
            ["plan", *(word for name, value in given.items() if value is not None for word in (f"{name}={value}",))]
        )
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    for word in said:
        assert word in err


# The simulated network


@WIRES
def test_simgrid_takes_as_long(wire: str, tmp_path: Path) -> None:
    if not (shutil.which("smpicc") and shutil.which("smpirun")):
        pytest.skip("no SimGrid here: smpicc and smpirun are missing (Debian: libsimgrid-dev)")
    words = ["--nodes", "2", "8", "--model-mb", "30", "--gbit", "100", "--comm-dtype", wire]
    done = run([sys.executable, str(ROOT / "benchmarks/simgrid/check.py"), *words], tmp_path, 100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["2", "8"]
    for line in lines:
        bound, model, simulated, to_bound, to_model = map(float, line[3:8])
        assert to_bound == pytest.approx(simulated / bound, rel=0.01)
        assert 1.0 <= to_bound < 1.05
        assert to_model == pytest.approx(simulated / model, rel=0.01)
        assert 0.98 < to_model < 1.02
