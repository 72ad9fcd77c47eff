"""What a request costs beside a raw MPI round trip, and what waiting costs: `mpiexec -n 2 python benchmarks/requests.py`.

Raw is Send and Recv of mpi4py. The two take turns in short rounds, so that whatever else the machine does meets both. The
ratio is that of the medians. Idle is the CPU time of a rank that waits, as a share of one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI

from mpips.comm.mpi import MpiCommunicator

SIZES = {"4 KB": 1 << 12, "64 KB": 1 << 16, "1 MB": 1 << 20}  # bytes each way
ROUND = 50  # round trips of one kind before it is the other's turn

Trip = Callable[[], object]


def raw_trip(comm: MPI.Comm, nbytes: int) -> Trip:
    """A round trip with mpi4py alone."""
    sent, received = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)  # zeros would share one page, always cached

    def worker() -> None:
        comm.Send(sent, 0, 1)
        comm.Recv(received, 0, 2)

    def server() -> None:
        comm.Recv(received, 1, 1)
        comm.Send(sent, 1, 2)

    return worker if comm.rank else server


def request_trip(communicator: MpiCommunicator, nbytes: int, overlap: bool) -> Trip:
    """A round trip with the communicator."""
    sent, received = torch.ones(nbytes // 4), torch.ones(nbytes // 4)

    def worker() -> None:
        communicator.request(sent, received, 1, overlap)()

    def server() -> None:
        rank, _ = communicator.next_request(received, nbytes // 4 - 1)
        communicator.respond(rank, sent)

    return worker if communicator.rank else server


def timed(trip: Trip, trips: int) -> list[float]:
    """Seconds of each trip."""
    seconds = []
    for _ in range(trips):
        begun = time.perf_counter()
        trip()
        seconds.append(time.perf_counter() - begun)
    return seconds


def compare(comm: MPI.Comm, kinds: dict[str, Trip], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round trip of each kind, the kinds interleaved."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, trip in kinds.items():
            comm.Barrier()
            taken = timed(trip, ROUND)
            seconds[kind] += taken if number else []  # the first round warms up
    return seconds


def idle(communicator: MpiCommunicator, seconds: float) -> float:
    """This rank's CPU share while it waits for the other: the worker for a held answer, then the server for a request."""
    message = torch.zeros(1024)
    used, begun = time.process_time(), time.perf_counter()
    if communicator.rank:
        finish = communicator.request(message, message.clone(), 1)
        used, begun = time.process_time(), time.perf_counter()
        finish()
        share = (time.process_time() - used) / (time.perf_counter() - begun)
        time.sleep(seconds)
        communicator.request(message, message.clone(), 1)()
        return share
    rank, _ = communicator.next_request(message, 1023)
    time.sleep(seconds)
    communicator.respond(rank, message)
    used, begun = time.process_time(), time.perf_counter()
    rank, _ = communicator.next_request(message, 1023)
    share = (time.process_time() - used) / (time.perf_counter() - begun)
    communicator.respond(rank, message)
    return share


def line(kind: str, seconds: list[float], raw: list[float]) -> str:
    """One kind's figures, in microseconds."""
    low, middle, high = (1e6 * f(seconds) for f in (min, statistics.median, max))
    ratio = statistics.median(seconds) / statistics.median(raw)
    return f"{kind:>16} {middle:9.1f} {low:9.1f} {high:9.1f} {ratio:7.2f}"


def main() -> None:
    """Print the figures at the worker, and the idle share of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help=f"rounds of {ROUND} round trips of each kind")
    parser.add_argument("--idle", type=float, default=3, help="seconds to wait for the other rank")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    communicator = MpiCommunicator(comm.Dup(), 1 << 24, cuda_aware=False)
    if comm.rank:
        print(f"{communicator.name}, medians over {args.rounds * ROUND} round trips\n")
        print(f"{'round trip, us':>16} {'median':>9} {'min':>9} {'max':>9} {'ratio':>7}", flush=True)
    for name, nbytes in SIZES.items():
        kinds = {f"{name} raw": raw_trip(comm, nbytes)}
        kinds[f"{name} request"] = request_trip(communicator, nbytes, overlap=False)
        kinds[f"{name} overlap"] = request_trip(communicator, nbytes, overlap=True)
        seconds = compare(comm, kinds, args.rounds)
        if comm.rank:
            print("\n".join(line(kind, its, seconds[f"{name} raw"]) for kind, its in seconds.items()), flush=True)
    shares = comm.gather(idle(communicator, args.idle), root=1)
    if shares:
        print(f"\nidle for {args.idle:g} s: server {100 * shares[0]:.1f} %, worker {100 * shares[1]:.1f} % of a core")


if __name__ == "__main__":
    main()
