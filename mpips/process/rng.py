"""The states of all random streams of a process: Python, numpy, torch, CUDA.

`restore(capture())` changes nothing. A resumed rank that restores its streams continues exactly where it was.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch

State = dict[str, np.ndarray]
Raw = tuple[Any, Any, torch.Tensor]


def swap(state: Raw | None = None) -> Raw:
    """Return the streams' states on the CPU, as their libraries have them, and set them to `state` if it is given."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if state is not None:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
    return before


def capture() -> State:
    """Return the streams' states as plain arrays."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    state: State = {
        "python": np.array([version, *words], dtype=np.uint64),
        "python_gauss": np.array([] if gauss is None else [gauss], dtype=np.float64),
        "numpy": np.asarray(keys, dtype=np.uint32),
        "numpy_position": np.array([position, has_gauss], dtype=np.int64),
        "numpy_gauss": np.array([cached], dtype=np.float64),
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state().numpy()  # the current device is this rank's
    return state


def restore(state: State) -> None:
    """Set every stream to its captured state."""
    version, *words = state["python"].tolist()
    gauss = float(state["python_gauss"][0]) if len(state["python_gauss"]) else None
    random.setstate((version, tuple(words), gauss))
    position, has_gauss = (int(x) for x in state["numpy_position"])
    np.random.set_state(("MT19937", state["numpy"], position, has_gauss, float(state["numpy_gauss"][0])))
    torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"].copy()))


def seed_of(state: State) -> int:
    """Return the seed of torch's stream."""
    return int.from_bytes(state["torch"][:8].tobytes(), "little")


def to_text(state: State) -> str:
    """Return the state as JSON."""
    return json.dumps({name: [str(value.dtype), value.tobytes().hex()] for name, value in state.items()})


def from_text(text: str) -> State:
    """Return the state that was given to `to_text`."""
    return {name: np.frombuffer(bytes.fromhex(words), dtype) for name, (dtype, words) in json.loads(text).items()}


def diverge(index: int) -> None:
    """Seed the streams of worker `index` differently. Worker 0 keeps the script's, so that one worker equals plain PyTorch."""
    if index == 0:
        return
    seed = (torch.initial_seed() + index * 0x9E3779B9) % 2**63
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
