"""What a rank alone knows and a checkpoint must hold: its random streams, its place in the data, its own buffers.

It travels as one blob of plain arrays; nothing is pickled.
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
from mpips.comm import Communicator, broadcast_bytes
from mpips.data import Place
from mpips.process import rng

Arrays = dict[str, np.ndarray]
STREAMS = ("streams", "orders")


@dataclass
class RankState:
    """One rank's own state.

    Attributes:
        index: the worker's number, -1 for a server that does not train.
        place: its place in the data.
        streams: its random streams.
        buffers: its own buffers by name, where the policy is `local`.
        gradients: gradients by name that it has accumulated and not yet pushed.
        own: what else the mode's update remembers: the worker's optimizer, clients' states.
        orders: the random streams that orders of data are drawn from.
        frozen: parameters that are not trained, by name, where the script has changed them itself; of worker 0.
        kept: what the script keeps in the checkpoint by `ps.keep`, of worker 0.
        slices: the server's optimizer's state of the slices that it serves, on its way to the server, which puts it together.
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
        """What this worker had computed beside its last push; see `Client.state`."""
        found: dict[str, Any] = self.own.get("ahead", {})
        return found

    def state_dict(self) -> dict[str, Any]:
        """As nested dicts of scalars, lists and tensors, for a checkpoint."""
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
        """What `tree` gave."""
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
        """As it was when this worker's last push left, if it has computed something beside that."""
        if not self.ahead:
            return self
        own = {key: kept for key, kept in self.own.items() if key != "ahead"}
        return dataclasses.replace(self, place=_place(self.ahead["sent"]), gradients={}, own=own)

    def pack(self) -> bytes:
        """As bytes for the wire."""
        arrays: Arrays = {}
        tree = self.state_dict() | {"slices": self.slices, "kept": self.kept, "frozen": self.frozen}
        for kind in STREAMS:
            arrays |= {f"{kind} {name}": value for name, value in tree.pop(kind).items()}
        arrays["words"] = np.frombuffer(json.dumps(_strip(tree, arrays)).encode(), dtype=np.uint8)
        return _join(arrays)

    @classmethod
    def unpack(cls, blob: bytes | memoryview) -> RankState:
        """What `pack` gave."""
        arrays = _split(blob)
        tree = _dress(json.loads(arrays["words"].tobytes()), arrays)
        for kind in STREAMS:
            tree[kind] = {n.removeprefix(f"{kind} "): array for n, array in arrays.items() if n.startswith(f"{kind} ")}
        tree["own"] = Saved(tree["own"], f"the state of worker {tree['index']} in the checkpoint")
        return cls.from_tree(tree)


def _place(tree: dict[str, Any]) -> Place:
    """Every field is there: none has its default for being lost."""
    return Place(**{name: tree[name] for name in Place.__dataclass_fields__})


def _strip(value: Any, arrays: Arrays) -> Any:
    """Nested dicts without their tensors, which go into `arrays`; in their place where, of which dtype and shape."""
    if isinstance(value, Tensor):
        name = f"tensor {len(arrays)}"
        arrays[name] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return {"*tensor": [name, str(value.dtype).removeprefix("torch."), list(value.shape)]}
    return {k: _strip(v, arrays) for k, v in value.items()} if isinstance(value, dict) else value


def _dress(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `_strip` was given."""
    if not isinstance(value, dict):
        return value
    if "*tensor" in value:
        name, dtype, shape = value["*tensor"]
        return _tensor(arrays[name], getattr(torch, dtype), shape)
    return {k: _dress(v, arrays) for k, v in value.items()}


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return tensor


def pack_all(states: list[RankState]) -> bytes:
    """Several ranks' states as one blob."""
    return _join({str(i): np.frombuffer(state.pack(), dtype=np.uint8) for i, state in enumerate(states)})


def unpack_all(blob: bytes) -> list[RankState]:
    """What `pack_all` gave."""
    return [RankState.unpack(array.data) for array in _split(blob).values()]


def _join(arrays: Arrays) -> bytes:
    """Arrays as one blob: a line of their names, dtypes and shapes, then their bytes.

    Reading numpy's own format leaves cyclic garbage of four functions an array, for as long as Python thinks fit.
    """
    if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
        raise TypeError(f"{objects[0]}: an array of Python objects, expected one of numbers")
    line = json.dumps([[name, array.dtype.str, array.shape] for name, array in arrays.items()])
    return b"".join([line.encode(), b"\n", *(array.tobytes() for array in arrays.values())])


def _split(blob: bytes | memoryview) -> Arrays:
    """What `_join` was given."""
    content = bytearray(blob)  # which arrays can be written to
    at = content.index(b"\n") + 1
    arrays = {}
    for name, dtype, shape in json.loads(content[: at - 1]):
        count = math.prod(shape)
        arrays[name] = np.frombuffer(content, dtype, count, at).reshape(shape)
        at += arrays[name].nbytes
    return arrays


def for_worker(states: list[RankState], index: int, workers: int) -> RankState | None:
    """The saved state with which worker `index` of `workers` goes on (-1: the server).

    With the same number of workers it is the worker's own. With another number all workers begin together at the items that
    nobody had taken, dealt out anew, and a worker that did not exist has no streams to go on with.
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
    place = Place(first.epoch, first.loop, 0, first.over, cuts, mine.place.samples if mine else 0, first.validations)
    clients = _clients(states, index, workers)
    if mine is None:  # begins with another's optimizer, whose scheduler has come as far; not with its elastic weights
        known = {key: kept for key, kept in saved[old[0]].own.items() if key == "inner"}
        return RankState(index, place, {}, own=known | clients, orders=saved[old[0]].orders)
    return RankState(index, place, mine.streams, mine.buffers, mine.gradients, mine.own | clients, orders=saved[old[0]].orders)


def _clients(states: list[RankState], index: int, workers: int) -> dict[str, Any]:
    """The states of those clients that worker `index` of `workers` hosts from now on."""
    saved = {k: state for s in states for k, state in s.own.get("clients", {}).items()}
    return {"clients": {k: state for k, state in saved.items() if int(k) % workers == index}} if saved else {}


def told_streams(communicator: Communicator, own: rng.State) -> rng.State:
    """The server's random streams, at every rank."""
    return RankState.unpack(broadcast_bytes(communicator, RankState(-1, Place(), own).pack())).streams
