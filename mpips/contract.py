"""What all ranks must agree on before any gradient moves: MPI itself adds mismatched tensors without a word.

Each rank writes the contract down, a line a tensor or setting. The digests are compared; only if they differ, the lines.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Sequence

import numpy as np
import torch

import mpips
from mpips.config import Config
from mpips.exchange import SERVER, Exchange, share
from mpips.message import Replica

PROTOCOL = 1
LOCAL = ("run_dir", "resume")  # settings that only the server acts on


class ContractError(RuntimeError):
    """Ranks that would corrupt each other's sums: names the rank and the first tensor or setting that differs."""


def write(config: Config, replica: Replica, optimizer: Sequence[str] = ()) -> list[str]:
    """The contract of this rank.

    Args:
        config, replica: the settings, and the model.
        optimizer: the lines about it, where its numbers travel; see `hyper.terms`.
    """
    versions = {"mpips": mpips.__version__, "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"python": ".".join(platform.python_version_tuple()[:2]), "byte order": sys.byteorder}
    lines = [f"protocol = {PROTOCOL}"]
    lines += [f"version of {name} = {version}" for name, version in versions.items()]
    lines += [f"setting {key} = {value!r}" for key, value in config.settings().items() if key not in LOCAL]
    dtype = replica.flat.weights.dtype
    lines += [f"parameter {s.name} = {dtype} {tuple(s.shape)} strides {s.stride}" for s in replica.flat.slots]
    lines += [f"alias {alias} = {name}" for alias, name in replica.flat.aliases.items()]
    lines += [f"frozen {name} = {p.dtype} {tuple(p.shape)}" for name, p in replica.flat.frozen.items()]
    lines += [f"buffer {name} = {b.dtype} {tuple(b.shape)}" for name, b in replica.buffers.named.items()]
    return [*lines, *optimizer]


def begin(exchange: Exchange, replica: Replica, config: Config, optimizer: Sequence[str] = ()) -> str:
    """Agree, then let every rank have the server's weights, trained and frozen, and buffers.

    Returns:
        The contract's SHA-256.

    Raises:
        ContractError: on every rank, before anything has moved.
    """
    digest = agree(exchange, write(config, replica, optimizer))
    for tensor in replica.everything:
        whole = tensor.detach().contiguous()
        exchange.publish(whole.view(-1))
        tensor.detach().copy_(whole)
    return digest


def agree(exchange: Exchange, lines: list[str]) -> str:
    """Compare the contract with all other ranks'.

    Returns:
        Its SHA-256.

    Raises:
        ContractError: on every rank, with the same text.
    """
    text = "\n".join(lines)
    digest = hashlib.sha256(text.encode())
    if len(set(exchange.compare(digest.digest()))) > 1:
        texts = exchange.collect(text.encode())
        verdict = _difference([t.decode().split("\n") for t in texts]) if exchange.rank == SERVER else ""
        raise ContractError(share(exchange, verdict.encode()).decode())
    return digest.hexdigest()


def _difference(contracts: list[list[str]]) -> str:
    """The first line of rank 0 that another rank does not have, or the other way round."""
    ours = contracts[SERVER]
    for rank, theirs in enumerate(contracts):
        for number in range(max(len(ours), len(theirs))):
            mine = ours[number] if number < len(ours) else "nothing more"
            other = theirs[number] if number < len(theirs) else "nothing more"
            if mine != other:
                return (
                    f"the ranks do not agree: rank {SERVER} has `{mine}`, rank {rank} has `{other}`; "
                    f"start every rank with the same script, settings and versions"
                )
    return "the ranks do not agree"
