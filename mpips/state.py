"""What a rank alone knows and a checkpoint must hold: its random streams, its place in the data, its own buffers.

It travels as one blob of plain arrays; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpips import rng
from mpips.data import Place

Arrays = dict[str, np.ndarray]


@dataclass
class RankState:
    """One rank's own state.

    Attributes:
        index: the worker's number, -1 for a server that does not train.
        place: its place in the data.
        streams: its random streams.
        buffers: its own buffers by name, where the policy is `local`.
        gradients: gradients by name that it has accumulated and not yet pushed.
    """

    index: int
    place: Place
    streams: rng.State
    buffers: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """As nested dicts of scalars, lists and tensors, for a checkpoint."""
        return {
            "index": self.index,
            "place": dataclasses.asdict(self.place),
            "streams": self.streams,
            "buffers": self.buffers,
            "gradients": self.gradients,
        }

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> RankState:
        """What `tree` gave."""
        return cls(tree["index"], Place(**tree["place"]), tree["streams"], tree["buffers"], tree["gradients"])

    def pack(self) -> bytes:
        """As bytes for the wire."""
        words: dict[str, Any] = {"index": self.index, "place": dataclasses.asdict(self.place)}
        kinds = {"buffers": self.buffers, "gradients": self.gradients}
        for kind, tensors in kinds.items():
            words[kind] = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()}
        arrays: Arrays = {"words": np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)}
        arrays |= {f"stream {name}": value for name, value in self.streams.items()}
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                arrays[f"{kind} {name}"] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    @classmethod
    def unpack(cls, blob: bytes) -> RankState:
        """What `pack` gave."""
        with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
            words = json.loads(arrays["words"].tobytes())
            streams = {n.removeprefix("stream "): arrays[n] for n in arrays.files if n.startswith("stream ")}
            buffers, gradients = (
                {
                    name: _tensor(arrays[f"{kind} {name}"], getattr(torch, dtype), shape)
                    for name, (dtype, shape) in words[kind].items()
                }
                for kind in ("buffers", "gradients")
            )
        return cls(words["index"], Place(**words["place"]), streams, buffers, gradients)


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return tensor


def pack_all(states: list[RankState]) -> bytes:
    """Several ranks' states as one blob."""
    file = io.BytesIO()
    np.savez(file, **{str(i): np.frombuffer(s.pack(), dtype=np.uint8) for i, s in enumerate(states)})  # type: ignore[arg-type]
    return file.getvalue()


def unpack_all(blob: bytes) -> list[RankState]:
    """What `pack_all` gave."""
    with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
        return [RankState.unpack(arrays[str(i)].tobytes()) for i in range(len(arrays.files))]


def for_worker(states: list[RankState], index: int, workers: int) -> RankState | None:
    """The saved state with which worker `index` of `workers` goes on (-1: the server).

    With the same number of workers it is the worker's own. With another number all workers begin together at the items that
    nobody had taken, dealt out anew, and a worker that did not exist has no streams to go on with.
    """
    saved = {s.index: s for s in states}
    mine = saved.get(index)
    old = sorted(i for i in saved if i >= 0)
    if index < 0 or len(old) == workers or not old:
        return mine
    places = [saved[i].place for i in old]
    first = places[0]
    cuts = first.cuts if first.over else [*first.cuts, [p.taken for p in places]]
    place = Place(first.epoch, first.loop, 0, first.over, cuts, mine.place.samples if mine else 0, first.validations)
    if mine is None:
        return RankState(index, place, {})
    return RankState(index, place, mine.streams, mine.buffers, mine.gradients)
