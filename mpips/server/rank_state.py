"""The state that one rank alone has and a checkpoint must hold: its random streams, its place in the data, its own buffers.

A state is sent as one blob of plain arrays, without pickle.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips.checkpoint import Saved
from mpips.comm import Blob, Communicator, broadcast_bytes
from mpips.data import Place
from mpips.model.flat import ALIGNMENT
from mpips.process import rng

Arrays = dict[str, np.ndarray]
STREAMS = ("streams", "orders")


@dataclass
class RankState:
    """One rank's own state.

    Attributes:
        index: the worker's number; -1 for a server that does not train.
        place: its place in the data.
        streams: its random streams.
        buffers: its own buffers by name: all if the setting `buffers` is "local", else those that have changed since the pull.
        gradients: the gradients by name that it has accumulated and not yet pushed.
        own: the state of the mode's update, such as the worker's optimizer or its clients' states.
        orders: the random streams that orders of data are drawn from.
        frozen: of worker 0, the frozen parameters by name that the script has changed itself.
        kept: of worker 0, what the script keeps in the checkpoint by `ps.keep`.
        slices: the server's optimizer's state for the slices that this rank serves; the server puts all ranks' slices together.
    """

    index: int
    place: Place
    streams: rng.State
    buffers: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    orders: rng.State = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ahead(self) -> dict[str, Any]:
        """The part of `own` that this worker has computed since its last push; see `Client.state`."""
        found: dict[str, Any] = self.own.get("ahead", {})
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state as nested dicts of scalars, lists and tensors, for a checkpoint."""
        return {
            "index": self.index,
            "place": {**vars(self.place), "cuts": list(self.place.cuts)},
            "streams": self.streams,
            "orders": self.orders,
            "buffers": self.buffers,
            "gradients": self.gradients,
            "own": self.own,
        }

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> RankState:
        """Return the state that `state_dict` returned as `tree`."""
        place = _place(tree["place"])
        named = {key: tree[key] for key in ("streams", "orders", "buffers", "gradients", "own")}
        return cls(
            tree["index"],
            place,
            **named,
            slices=tree.get("slices", {}),
            kept=tree.get("kept", {}),
            frozen=tree.get("frozen", {}),
        )

    def without_ahead(self) -> RankState:
        """Return the state at this worker's last push, without what it has computed since."""
        if not self.ahead:
            return self
        own = {key: kept for key, kept in self.own.items() if key != "ahead"}
        return dataclasses.replace(self, place=_place(self.ahead["sent"]), gradients={}, own=own)

    def for_lost(self, index: int) -> RankState:
        """Return the state of worker `index`, which has died, for a checkpoint: this worker's place, and nothing of its own."""
        known = {key: kept for key, kept in self.own.items() if key == "inner"}
        return RankState(index, dataclasses.replace(self.place, samples=0), {}, own=known, orders=self.orders)

    def pack(self) -> bytes:
        """Return the state as bytes, to be sent."""
        return b"".join(self.parts())

    def parts(self) -> list[Blob]:
        """Return the bytes of `pack` in parts, which are the memory of large tensors where that is possible."""
        arrays: Arrays = {}
        tree = self.state_dict() | {"slices": self.slices, "kept": self.kept, "frozen": self.frozen}
        for kind in STREAMS:
            arrays |= {f"{kind} {name}": value for name, value in tree.pop(kind).items()}
        arrays["words"] = np.frombuffer(json.dumps(_strip(tree, arrays)).encode(), dtype=np.uint8)
        return _parts(arrays)

    @classmethod
    def unpack(cls, blob: Blob) -> RankState:
        """Return the state that `pack` returned as `blob`. Its tensors are in the blob's memory if that can be written to."""
        arrays = _split(blob)
        tree = _dress(json.loads(arrays["words"].tobytes()), arrays)
        for kind in STREAMS:
            tree[kind] = {n.removeprefix(f"{kind} "): array.copy() for n, array in arrays.items() if n.startswith(f"{kind} ")}
        tree["own"] = Saved(tree["own"], f"the state of worker {tree['index']} in the checkpoint")
        return cls.from_tree(tree)


def _place(tree: dict[str, Any]) -> Place:
    """Return the place saved in `tree`. A missing field is an error, not the default."""
    return Place(**{name: tree[name] for name in Place.__dataclass_fields__})


def _strip(value: Any, arrays: Arrays) -> Any:
    """Return nested dicts in which each tensor, moved to `arrays`, is replaced by its array's name, its dtype and its shape."""
    if isinstance(value, Tensor):
        name = f"tensor {len(arrays)}"
        arrays[name] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return {"*tensor": [name, str(value.dtype).removeprefix("torch."), list(value.shape)]}
    return {k: _strip(v, arrays) for k, v in value.items()} if isinstance(value, dict) else value


def _dress(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the value that `_strip` was given."""
    if not isinstance(value, dict):
        return value
    if "*tensor" in value:
        name, dtype, shape = value["*tensor"]
        return _tensor(arrays[name], getattr(torch, dtype), shape)
    return {k: _dress(v, arrays) for k, v in value.items()}


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if raw.flags.writeable and raw.size:
        return torch.from_numpy(raw).view(dtype).view(shape)
    tensor = torch.empty(shape, dtype=dtype)
    np.copyto(tensor.view(-1).view(torch.uint8).numpy(), raw)
    return tensor


def pack_all(states: list[RankState]) -> bytes:
    """Return several ranks' states as one blob."""
    return b"".join(_parts({str(i): np.frombuffer(state.pack(), dtype=np.uint8) for i, state in enumerate(states)}))


def unpack_all(blob: bytes) -> list[RankState]:
    """Return the states that `pack_all` was given."""
    return [RankState.unpack(array.data) for array in _split(blob).values()]


def _parts(arrays: Arrays) -> list[Blob]:
    """Return arrays as the parts of one blob: a line of their names, dtypes and shapes, then their bytes.

    Each array begins at a multiple of 64 bytes, so that a tensor can lie in the blob's memory.

    numpy's own format is not used: reading it leaves cyclic garbage of four functions for each array.
    """
    if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
        raise TypeError(f"{objects[0]}: an array of Python objects, expected one of numbers")
    line = json.dumps([[name, array.dtype.str, array.shape] for name, array in arrays.items()]).encode()
    parts: list[Blob] = [line, b" " * (-(len(line) + 1) % ALIGNMENT), b"\n"]
    for array in arrays.values():
        if array.size:
            parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, bytes(-array.nbytes % ALIGNMENT)]
    return parts


def _split(blob: Blob) -> Arrays:
    """Return the arrays that `_parts` was given, without a copy: they refer to the blob."""
    at = _line_length(blob)
    arrays = {}
    for name, dtype, shape in json.loads(bytes(blob[: at - 1])):
        count = math.prod(shape)
        arrays[name] = np.frombuffer(blob, dtype, count, at).reshape(shape)
        at += -(-arrays[name].nbytes // ALIGNMENT) * ALIGNMENT
    return arrays


def _line_length(blob: Blob) -> int:
    """Return the length of the blob's first line."""
    length = 1 << 12
    while (at := bytes(blob[:length]).find(b"\n")) < 0:
        length *= 2
    return at + 1


def for_worker(states: list[RankState], index: int, workers: int) -> RankState | None:
    """Return the saved state from which worker `index` of `workers` continues; index -1 is the server.

    With as many workers as before, it is the worker's own. With another number, all workers begin at the items that no worker
    had taken, newly sharded. A worker that did not exist before has no random streams of its own to continue.

    Args:
        states: the saved states of all ranks.
        index: the worker's number.
        workers: the number of workers now.
    """
    saved = {s.index: s for s in states}
    old = sorted(i for i in saved if i >= 0)
    if index < 0 or len(old) == workers or not old:
        return saved.get(index)
    saved = {i: s.without_ahead() for i, s in saved.items()}
    mine = saved.get(index)
    places = [saved[i].place for i in old]
    first = places[0]
    cuts = first.cuts if first.over else [*first.cuts, [p.taken for p in places]]
    samples, own = mine.place.samples if mine else 0, mine.place if mine else first
    place = Place(first.epoch, first.loop, 0, first.over, cuts, samples, False, False, own.calls, own.calling, own.latest)
    clients = _clients(states, index, workers)
    if mine is None:  # takes the first worker's optimizer, with its scheduler's progress, but not its elastic weights
        known = {key: kept for key, kept in saved[old[0]].own.items() if key == "inner"}
        return RankState(index, place, {}, own=known | clients, orders=saved[old[0]].orders)
    return RankState(index, place, mine.streams, mine.buffers, mine.gradients, mine.own | clients, orders=saved[old[0]].orders)


def _clients(states: list[RankState], index: int, workers: int) -> dict[str, Any]:
    """Return the states of the clients that worker `index` of `workers` hosts from now on."""
    saved = {k: state for s in states for k, state in s.own.get("clients", {}).items()}
    return {"clients": {k: state for k, state in saved.items() if int(k) % workers == index}} if saved else {}


def told_streams(communicator: Communicator, own: rng.State) -> rng.State:
    """Return the server's random streams on every rank.

    Args:
        communicator: this rank's end.
        own: this rank's streams; only the server's matter.
    """
    return RankState.unpack(broadcast_bytes(communicator, RankState(-1, Place(), own).pack())).streams
