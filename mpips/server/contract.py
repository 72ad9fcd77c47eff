"""What all ranks must agree on before any gradient moves: MPI itself adds mismatched tensors without a word.

Each rank writes the contract down, a line a tensor or setting. The digests are compared; only if they differ, the lines.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence

import numpy as np
import torch

import mpips
from mpips.comm import SERVER, Communicator, broadcast_bytes
from mpips.config import Config, cut
from mpips.model.message import Replica

PROTOCOL = 1
MOST_RANKS = 4  # that a line names
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
    lines += [f"setting {key} = {value}" for key, value in shared_settings(config).items()]
    dtype = replica.flat.weights.dtype
    lines += [f"parameter {s.name} = {dtype} {tuple(s.shape)} strides {s.stride}" for s in replica.flat.slots]
    lines += [f"alias {alias} = {name}" for alias, name in replica.flat.aliases.items()]
    lines += [f"frozen {name} = {p.dtype} {tuple(p.shape)}" for name, p in replica.flat.frozen.items()]
    lines += [f"buffer {name} = {b.dtype} {tuple(b.shape)}" for name, b in replica.buffers.named.items()]
    return [*lines, *optimizer]


def shared_settings(config: Config) -> dict[str, str]:
    """What must be alike on all ranks, as text."""
    return {key: repr(value) for key, value in config.settings().items() if key not in LOCAL}


def agree_on_settings(communicator: Communicator, settings: Config | str) -> str:
    """Compare the settings with all other ranks', before anything else is said on this communicator.

    Args:
        communicator: this rank's end.
        settings: this rank's, or the line in which it refuses them.

    Returns:
        Why the run is refused, the same line on every rank; nothing if it is not.
    """
    given = settings if isinstance(settings, str) else shared_settings(settings)
    text = json.dumps(given).encode()
    if len(set(communicator.allgather_digests(hashlib.sha256(text).digest()))) == 1:
        return given if isinstance(given, str) else ""
    everyone = [json.loads(blob) for blob in communicator.gather_bytes(text)]
    return broadcast_bytes(communicator, _refusal(everyone).encode() if communicator.rank == SERVER else b"").decode()


def _refusal(given: list[str | dict[str, str]]) -> str:
    """The first refusal, or the first setting that differs, and on which ranks."""
    for line in given:
        if isinstance(line, str):
            return f"{line}, {_ranks([rank for rank, other in enumerate(given) if other == line])}"
    settings = [one for one in given if isinstance(one, dict)]
    key = next(key for key, value in settings[SERVER].items() if any(other[key] != value for other in settings))
    values = [one[key] for one in settings]
    each = {value: _ranks([rank for rank, other in enumerate(values) if other == value]) for value in values}
    return (
        f"{key}: given {', '.join(f'{cut(value)} {ranks}' for value, ranks in each.items())}, allowed: one value on all ranks"
    )


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else ""
    return f"on {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks[:MOST_RANKS]))}{more}"


def begin(communicator: Communicator, replica: Replica, config: Config, optimizer: Sequence[str] = ()) -> str:
    """Agree, then let every rank have the server's weights, trained and frozen, and buffers.

    Returns:
        The contract's SHA-256.

    Raises:
        ContractError: on every rank, before anything has moved.
    """
    digest = agree(communicator, write(config, replica, optimizer))
    for tensor in replica.everything:
        whole = tensor.detach().contiguous()
        communicator.broadcast(whole.view(-1))
        tensor.detach().copy_(whole)
    return digest


def agree(communicator: Communicator, lines: list[str]) -> str:
    """Compare the contract with all other ranks'.

    Returns:
        Its SHA-256.

    Raises:
        ContractError: on every rank, with the same text.
    """
    text = "\n".join(lines)
    digest = hashlib.sha256(text.encode())
    if len(set(communicator.allgather_digests(digest.digest()))) > 1:
        texts = communicator.gather_bytes(text.encode())
        verdict = _difference([t.decode().split("\n") for t in texts]) if communicator.rank == SERVER else ""
        raise ContractError(broadcast_bytes(communicator, verdict.encode()).decode())
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
