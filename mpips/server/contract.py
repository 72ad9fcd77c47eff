"""The contract: what all ranks must agree on before any gradient moves, as MPI adds mismatched tensors without an error.

Each rank writes the contract as text, one line for each tensor or setting. The ranks compare their digests, and the lines only
if the digests differ.
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
MOST_RANKS = 4  # the most ranks that an error names
LOCAL = ("run_dir", "resume", "chaos")  # settings that change no number: where the server writes, and who makes faults


class ContractError(RuntimeError):
    """Ranks that would corrupt each other's sums. The message names the rank and the first line that differs."""


def write(config: Config, replica: Replica, optimizer: Sequence[str] = ()) -> list[str]:
    """Return the lines of this rank's contract.

    Args:
        config: the settings.
        replica: the model.
        optimizer: the lines about the optimizer, if its hyperparameters travel; see `hyper.terms`.
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
    """Return the settings that must be equal on all ranks, as text by key."""
    return {key: repr(value) for key, value in config.settings().items() if key not in LOCAL}


def agree_on_settings(communicator: Communicator, settings: Config | str) -> str:
    """Compare the settings of all ranks, in the first collective calls on this communicator.

    Args:
        communicator: this rank's end.
        settings: this rank's settings, or the line by which it refuses them.

    Returns:
        Why the run is refused, the same line on every rank; an empty string if the settings agree.
    """
    given = settings if isinstance(settings, str) else shared_settings(settings)
    text = json.dumps(given).encode()
    if len(set(communicator.allgather_digests(hashlib.sha256(text).digest()))) == 1:
        return given if isinstance(given, str) else ""
    everyone = [json.loads(bytes(blob)) for blob in communicator.gather_bytes(text)]
    return broadcast_bytes(communicator, _refusal(everyone).encode() if communicator.rank == SERVER else b"").decode()


def _refusal(given: list[str | dict[str, str]]) -> str:
    """Return the first refusal, or the first setting that differs, with the ranks."""
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
    """Agree on the contract, then broadcast the server's weights, trained and frozen, and buffers.

    Args:
        communicator: this rank's end.
        replica: the model, which receives the weights.
        config: the settings.
        optimizer: the contract's lines about the optimizer.

    Returns:
        The contract's SHA-256.

    Raises:
        ContractError: on every rank, before any weights move.
    """
    digest = agree(communicator, write(config, replica, optimizer))
    for tensor in replica.everything:
        whole = tensor.detach().contiguous()
        communicator.broadcast(whole.view(-1))
        tensor.detach().copy_(whole)
    return digest


def agree(communicator: Communicator, lines: list[str]) -> str:
    """Compare the contracts of all ranks.

    Args:
        communicator: this rank's end.
        lines: this rank's contract.

    Returns:
        The contract's SHA-256.

    Raises:
        ContractError: on every rank, with the same text.
    """
    text = "\n".join(lines)
    digest = hashlib.sha256(text.encode())
    if len(set(communicator.allgather_digests(digest.digest()))) > 1:
        texts = communicator.gather_bytes(text.encode())
        verdict = _difference([bytes(t).decode().split("\n") for t in texts]) if communicator.rank == SERVER else ""
        raise ContractError(broadcast_bytes(communicator, verdict.encode()).decode())
    return digest.hexdigest()


def _difference(contracts: list[list[str]]) -> str:
    """Return an error that names the first line in which a rank differs from rank 0."""
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
