"""The cost model against SimGrid: `python benchmarks/simgrid/check.py --nodes 8 64 256 --model-mb 100 --gbit 200`.

Writes what the leaders of so many nodes would post in a round, as `mpips.cli.plan.schedule` computes it with the code that lays
out a run, and replays it with SimGrid's MPI on a simulated network: a full-duplex link for each node, and a switch that never
limits. Only what travels is compared, in both: nothing is computed, posting a message takes no time. Needs smpicc and smpirun
(Debian: libsimgrid-dev).
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mpips.cli.plan import Job, Machine, Schedule, predict, schedule
from mpips.model.layout import FLIGHT

REPLAY = Path(__file__).with_name("replay.c")
PLATFORM = """\
<?xml version="1.0"?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="nodes" prefix="n" suffix="" radical="0-{last}" speed="1Gf" bw="{link}Bps" lat="{latency}s"
           sharing_policy="SPLITDUPLEX"/>
</platform>
"""
FLAGS = [
    "--cfg=network/model:CM02",  # the links' own figures: no factors measured on somebody's cluster
    "--cfg=network/crosstraffic:0",  # acknowledgements take no bandwidth of the other direction
    "--cfg=network/TCP-gamma:0",  # no window limits a flow
    "--cfg=smpi/send-is-detached-thresh:0",  # every send waits for its receiver; else SimGrid takes longer
    "--cfg=contexts/factory:raw",
    "--cfg=smpi/simulate-computation:no",
    "--log=root.thres:warning",
]


def posted(plan: Schedule, node: int) -> Iterator[str]:
    """What one node posts, as replay.c reads it."""
    steps = range(len(plan.parts))
    yield f"steps {len(steps)}"
    for way in ("push", "pull"):
        for step in steps:
            sent, taken = plan.messages(way, step, node)
            for name, messages in (("taken", taken), ("sent", sent)):
                yield " ".join([name, str(len(messages)), *(f"{peer} {count}" for peer, count in messages)])


def compiled(folder: Path) -> Path:
    """The program that replays."""
    program = folder / "replay"
    subprocess.run(["smpicc", "-O2", "-Wall", "-o", program, REPLAY], check=True)
    return program


def replayed(job: Job, machine: Machine, plan: Schedule, folder: Path, program: Path, timeout: float) -> tuple[float, float]:
    """Simulated seconds of the push, and of both ways."""
    for node in range(job.nodes):
        (folder / f"{node}.txt").write_text("\n".join(posted(plan, node)) + "\n")
    (folder / "platform.xml").write_text(
        PLATFORM.format(last=job.nodes - 1, link=machine.link, latency=machine.latency / 2)  # up to the switch, and down
    )
    (folder / "hosts").write_text("".join(f"n{node}\n" for node in range(job.nodes)))
    longest = max(map(max, plan.parts), default=0)
    command = ["smpirun", "-np", job.nodes, "-platform", folder / "platform.xml", "-hostfile", folder / "hosts"]
    command += [*FLAGS, program, folder, longest, FLIGHT, FLIGHT if job.comm_dtype == "bfloat16" else len(plan.parts)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"smpirun ended with status {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    push, both = map(float, done.stdout.split())
    return push, both


def main() -> int:
    """One line for each number of nodes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 64], help="numbers of nodes, each at least 2")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="they change where slices begin")
    parser.add_argument("--model-mb", type=float, default=100.0, help="of 10^6 bytes")
    parser.add_argument("--gbit", type=float, default=200.0, help="of each link, each way")
    parser.add_argument("--latency-us", type=float, default=2.0)
    parser.add_argument("--comm-dtype", choices=["full", "bfloat16"], default="full")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one simulation")
    options = parser.parse_args()
    if not (shutil.which("smpicc") and shutil.which("smpirun")):
        print("check: smpicc and smpirun are not there; Debian has them in libsimgrid-dev", file=sys.stderr)
        return 2
    machine = Machine(link=options.gbit * 1e9 / 8, latency=1e-6 * options.latency_us, message=0.0, memory=math.inf)
    print(
        f"{options.model_mb:g} MB, {options.gbit:g} Gbit/s, {options.latency_us:g} us, wire {options.comm_dtype}; milliseconds"
    )
    print(f"{'nodes':>6}{'steps':>6}{'messages':>11}{'bound':>10}{'model':>10}{'simulated':>10}{'/ bound':>9}{'/ model':>9}"
          f"{'here, s':>9}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        program = compiled(Path(name))
        for nodes in options.nodes:
            job = Job.of(nodes, options.ranks_per_node, 1e6 * options.model_mb, plan="sharded", comm_dtype=options.comm_dtype)
            plan, found = schedule(job), predict(job, machine)
            begun = time.monotonic()
            both = replayed(job, machine, plan, Path(name), program, options.timeout)[1]
            model = found.push + found.pull
            steps, messages = len(plan.parts), found.messages // 2 * nodes
            print(f"{nodes:>6}{steps:>6}{messages:>11,}{1e3 * found.bound:>10.3f}{1e3 * model:>10.3f}{1e3 * both:>10.3f}"
                  f"{both / found.bound:>9.3f}{both / model:>9.3f}{time.monotonic() - begun:>9.1f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
