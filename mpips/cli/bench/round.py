"""A round: from gradients in place on every rank until every rank has the new weights."""

from __future__ import annotations

import argparse
import gc
import sys
from typing import TYPE_CHECKING

import torch

from mpips.cli.bench.agreement import ROUNDED, ROUNDING, agree
from mpips.cli.bench.case import Case, case, rate
from mpips.cli.bench.clock import Variant, interleave
from mpips.cli.bench.facts import communicator, facts, leaders
from mpips.cli.bench.gradient import initial, numel
from mpips.cli.bench.limit import limit
from mpips.cli.bench.opponents import Functions, Theirs, opponents
from mpips.cli.bench.own import Own, Parts, connected, join, momentum_sgd

if TYPE_CHECKING:
    from mpi4py import MPI

MB = 1 << 20


def rounds(options: argparse.Namespace) -> list[Case]:
    """Return one case for each size. Called on every rank."""
    join()  # first: it reports if MPI was started wrongly
    comm = communicator()
    hosts = leaders(comm)
    against = opponents(options.against, "make_round")
    sizes = [mb * MB for mb in options.mb] if options.kind != "small" else [kb * 1024 for kb in options.kb]
    batch = options.rounds if options.kind == "small" else 1
    cases = []
    for nbytes in sizes:
        if comm.rank == 0:
            print(f"mpips bench: {comm.size} ranks, {nbytes / MB:g} MB", file=sys.stderr, flush=True)
        cases.append(one_size(comm, hosts, against, numel(nbytes), options.repeats, batch, options.step == "fused"))
        gc.collect()
    return cases


def one_size(comm: MPI.Comm, hosts: list[int], against: Functions, count: int, repeats: int, batch: int, fused: bool) -> Case:
    """Measure all variants alternately on a model of `count` float32 values; a measurement is `batch` rounds."""
    make, scratch, model = momentum_sgd(fused), torch.zeros(count), Parts(initial(count))
    bound = limit(comm, hosts, 4 * count)
    others = {name: Theirs(make_round, comm, initial(count), scratch, make) for name, make_round in against.items()}
    label = {"n": comm.size, "mb": 4 * count / MB}
    with connected(join(), model, make) as ps:
        own = Own(ps, comm.rank, model)
        variants: dict[str, Variant] = {"mpips": own, "limit": bound, **others}
        seconds = interleave(comm, variants, repeats, batch)
        weights = {name: split(them.weights, own) for name, them in others.items()}
        allowed = ROUNDING if ps.config.comm_dtype == "full" else ROUNDED
        agreed = agree(comm, own.weights, weights, f"{label['n']} ranks, {label['mb']:g} MB", allowed)
    seconds["limit"] = [bound.scale * taken for taken in seconds["limit"]]
    found = case(label, seconds, batch)
    if batch > 1:
        found |= rate(found, "rounds_per_s", 1)
    details = {"repeats": repeats, "rounds": batch, **agreed, "step": "fused" if fused else "plain"}
    return found | details | facts(len(hosts))


def split(weights: torch.Tensor, own: Own) -> list[torch.Tensor]:
    """Return flat weights split into the parts of mpips' model."""
    return list(torch.split(weights, [part.numel() for part in own.weights]))
