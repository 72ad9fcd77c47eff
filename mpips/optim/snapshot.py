"""The server's state as a tree of plain tensors, numbers and texts, keyed by parameter name, and back.

A restored server continues with the same bits. A tree is checked against the model before anything is copied, so a snapshot of
another model changes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from mpips.model.message import Replica

Tree = dict[str, Any]
# Classes of torch's whose state has the parameter's shape, or is one number.
SHAPED = {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}


class SnapshotError(ValueError):
    """A snapshot of another model or optimizer. The message names the first tensor that differs."""


def to_json(value: Any) -> str:
    """Return nested dicts (keys of any type), lists, tuples, dtypes and numbers as text that `from_json` restores exactly."""
    return json.dumps(_encode(value))


def from_json(text: str) -> Any:
    """Return the value that was given to `to_json`; tuples come back as lists."""
    return _decode(json.loads(text))


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of this name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r} is none of torch's")
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return value.item() if isinstance(value, (Tensor, np.generic)) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, pairs),) = value.items()
        if kind == "dtype":
            return dtype_of(pairs)
        items = {_decode(k): _decode(v) for k, v in pairs}
        return Counter(items) if kind == "counter" else items
    return [_decode(v) for v in value] if isinstance(value, list) else value


def take_model(replica: Replica, changed: Mapping[str, Tensor] | None = None) -> Tree:
    """Return all parameters (trained, frozen and tied) and all persistent buffers, by name.

    Trained parameters are read from the pull message, since a worker on this rank may have moved its own weights from there.
    Frozen parameters named in `changed` are taken from `changed`.
    """
    flat = replica.flat
    parameters: dict[str, Tensor] = dict(flat.named(replica.pull.weights))  # a worker's own may differ
    parameters |= {name: p.data for name, p in flat.frozen.items()} | dict(changed or {})
    parameters |= {alias: parameters[name] for alias, name in flat.aliases.items()}
    return {"parameters": parameters, "buffers": dict(replica.buffers.named)}


def put_model(tree: Tree, replica: Replica) -> None:
    """Copy the tensors of `take_model` back into the model.

    Raises:
        SnapshotError: names, shapes or dtypes are not the model's. Nothing has been changed then.
    """
    for kind, ours in take_model(replica).items():
        check_same(kind, ours, tree[kind])
    for kind, ours in take_model(replica).items():
        for name, tensor in ours.items():
            tensor.detach().copy_(tree[kind][name])
    replica.buffers.store(replica.pull.buffers)


def check_same(kind: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """Raise SnapshotError for the first tensor that only one side has, or whose dtype or shape differs."""
    for name in [*ours, *theirs]:
        mine = f"{ours[name].dtype} {tuple(ours[name].shape)}" if name in ours else "nothing"
        other = theirs.get(name)
        saved = f"{other.dtype} {tuple(other.shape)}" if isinstance(other, Tensor) else "nothing"
        if mine != saved:
            raise SnapshotError(f"{kind[:-1]} {name}: the checkpoint has {saved}, the model {mine}; give the model it is of")


def take_optimizer(optimizer: Optimizer, kind: str, names: Mapping[Tensor, str]) -> Tree:
    """Return the class, parameter groups and state of an optimizer, by parameter name."""
    members = [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups]
    state = {names[p]: {str(k): v for k, v in entries.items()} for p, entries in optimizer.state.items() if p in names}
    return optimizer_tree(optimizer, kind, members, state)


def optimizer_tree(optimizer: Optimizer, kind: str, members: Sequence[Sequence[str]], state: Tree) -> Tree:
    """Return the tree of `take_optimizer`, given each group's parameter names and the state by parameter name."""
    groups = [{**group, "params": list(names)} for group, names in zip(optimizer.param_groups, members, strict=True)]
    return {"class": kind, "groups": to_json(groups), "state": state, "entries": _entries(state)}


def _entries(state: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the number of state entries. It tells a parameter without state from one whose state is missing."""
    return sum(value is not None for entries in state.values() for value in entries.values())


def put_optimizer(tree: Tree, optimizer: Optimizer, kind: str, names: Mapping[Tensor, str]) -> None:
    """Restore the state that `take_optimizer` returned.

    Raises:
        SnapshotError: the optimizer is of another class or has other groups, or the state is incomplete or of other shapes.
    """
    if tree["class"] != kind:
        raise SnapshotError(f"the checkpoint has optimizer {tree['class']}, this run {kind}")
    saved_groups = from_json(tree["groups"])
    own_members = [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups]
    if [group["params"] for group in saved_groups] != own_members:
        raise SnapshotError("the checkpoint's optimizer has other parameter groups; build the optimizer as in that run")
    if (found := _entries(tree["state"])) != tree["entries"]:
        raise SnapshotError(f"optimizer/state: the checkpoint has {found} of {tree['entries']} entries; use another checkpoint")
    if kind in SHAPED and type(optimizer).__module__.startswith("torch.optim."):
        _check_state(tree["state"], {name: p for p, name in names.items()})
    order = [name for group in own_members for name in group]
    groups = [as_now(saved, now) for saved, now in zip(saved_groups, optimizer.param_groups, strict=True)]
    start = 0
    for group, members in zip(groups, own_members, strict=True):
        group["params"] = list(range(start, start := start + len(members)))
    state = {order.index(name): dict(entries) for name, entries in tree["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, entries in optimizer.state.items():  # torch casts to the parameter's dtype; NAdam's mu_product stays float32
        for key, value in entries.items():
            if isinstance(value, Tensor):
                entries[key] = value.to(tree["state"][names[p]][key].dtype)


def _check_state(state: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> None:
    """Raise SnapshotError for state that neither has its parameter's shape nor is one number.

    Otherwise the first step would fail, or broadcast silently.
    """
    for name, entries in state.items():
        for key, value in entries.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if shape not in ((), (1,), tuple(parameters[name].shape)):
                raise SnapshotError(
                    f"optimizer/state/{name}/{key}: the checkpoint has the shape {shape}, the parameter "
                    f"{tuple(parameters[name].shape)}; use another checkpoint"
                )


def as_now(saved: Tree, now: Mapping[str, Any]) -> Tree:
    """Return a saved parameter group with tuples and tensors where the present group has them; JSON has neither."""
    return {k: _alike(v, now.get(k)) for k, v in saved.items()}


def _alike(value: Any, own: Any) -> Any:
    if isinstance(own, tuple):
        return tuple(map(_alike, value, own))
    return torch.tensor(value, dtype=own.dtype, device=own.device) if isinstance(own, Tensor) else value
