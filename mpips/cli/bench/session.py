"""A benchmark from the command line to the output: on its own ranks, on ranks that it starts, or in this process."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace

from mpips.cli.bench import flags
from mpips.cli.bench.case import Case
from mpips.cli.bench.error import BenchError
from mpips.cli.bench.picture import draw
from mpips.cli.bench.table import table
from mpips.cli.launch import launch_command, run
from mpips.cli.screen import Lines
from mpips.report import stdout


def bench(options: argparse.Namespace) -> int:
    """Measure, show the results, and return the exit status.

    Raises:
        BenchError: there is no result.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
    from mpips.comm import mpi

    ranks = mpi.launched()
    if ranks > 1 and options.kind in ("scaling", "checkpoint"):
        raise BenchError(f"{options.kind} was started on {ranks} ranks, expected one process: it is no job for mpirun", 2)
    if ranks > 1:
        return on_ranks(options)
    if options.kind == "checkpoint":
        with redirect_stdout(sys.stderr):
            cases = measure(options)
    else:
        sizes = options.size if options.kind == "scaling" else [options.size]
        cases = [each for size in sizes for each in started(options, size)]
    show(options, cases)
    return 0


def on_ranks(options: argparse.Namespace) -> int:
    """Measure on the ranks of which this process is one; rank 0 shows the results. Return the exit status."""
    try:
        with redirect_stdout(sys.stderr):  # stdout is reserved for the figures
            cases = measure(options)
    except BenchError as error:
        if rank() == 0:
            raise
        return error.status
    if rank() == 0:
        options.size = cases[0]["n"]
        show(options, cases)
    return 0


def rank() -> int:
    """Return this rank, once MPI runs."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank


def measure(options: argparse.Namespace) -> list[Case]:
    """Measure in this process."""
    if options.kind == "train":
        from mpips.cli.bench.train import train as chosen
    elif options.kind == "checkpoint":
        from mpips.cli.bench.checkpoint import checkpoints as chosen
    else:
        from mpips.cli.bench.round import rounds as chosen
    return chosen(options)


class Listener(Lines):
    """A view that keeps the ranks' stdout, which has the figures, and passes everything else on."""

    def __init__(self) -> None:
        super().__init__()
        self.said = b""

    def write(self, stream: int, data: bytes) -> None:
        """Keep stdout, and pass stderr on."""
        if stream == 1:
            self.said += data
        else:
            super().write(stream, data)


def started(options: argparse.Namespace, size: int) -> list[Case]:
    """Start `size` ranks, measure on them, and return the cases.

    Raises:
        BenchError: the ranks reported an error, or no figures.
    """
    own = argparse.Namespace(**{**vars(options), "kind": "round" if options.kind == "scaling" else options.kind})
    try:
        launch = launch_command(size, ["-m", "mpips.cli.bench", *flags.words(own), "--json"], mpi_args=options.mpi_args)
    except FileNotFoundError as error:
        raise BenchError(str(error), 2) from None
    launch = replace(launch, variables={"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"], **launch.variables})
    print(launch, file=sys.stderr)
    listener = Listener()
    outcome = run(launch, listener)
    text = listener.said.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        raise BenchError(f"{size} ranks ended with status {outcome.exit} and gave no figures {text[-500:]!r}") from None
    if isinstance(found, dict):
        raise BenchError(str(found["error"]), int(found["exit"]))
    return list(found)


def show(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Print the table or the JSON, and write both and the picture to the folder of `--out`."""
    text = table(options.kind, cases, command(options))
    listed = "[\n" + ",\n".join(json.dumps(each) for each in cases) + "\n]"
    stdout.write(listed if options.json else text)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.kind}.txt").write_text(text + "\n")
    (options.out / f"{options.kind}.json").write_text(listed + "\n")
    if not draw(options.kind, cases, options.out / f"{options.kind}.png"):
        print('mpips bench: no picture; it needs a package: pip install "mpips[plot]"', file=sys.stderr)


def command(options: argparse.Namespace) -> list[str]:
    """Return the command that repeats this measurement."""
    size = getattr(options, "size", None)
    ranks = [] if size is None else ["-n", flags.comma(size) if isinstance(size, list) else str(size)]
    return ["mpips", "bench", *flags.words(options)[:1], *ranks, *flags.words(options)[1:]]
