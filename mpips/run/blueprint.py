"""A model and its optimizer as a message, from which a server that has left the script can serve a further run.

Rank 0 builds its first model by running the script. For a later run it needs only names, tensors and the optimizer's class; the
forward pass stays on the workers.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpips.config import Config, ConfigError
from mpips.data import Place
from mpips.model.flat import unwrap
from mpips.optim.foreign import kind
from mpips.process import rng
from mpips.run import keeping
from mpips.server.rank_state import RankState


def describe(config: Config, model: nn.Module, optimizer: Optimizer) -> bytes:
    """Return what a server needs to know of a run.

    Raises:
        ConfigError: the optimizer is not of one of torch's classes, so its state cannot be known.
    """
    given, module = kind(optimizer), unwrap(model)
    if not given.__module__.startswith("torch.optim."):
        raise ConfigError(
            f"optimizer: given a {given.__name__} to a second connect, allowed: one of torch's there, as the server has left "
            f"the script; or server_trains, in all runs of the script"
        )
    named = dict(module.named_parameters(remove_duplicate=False))
    first: dict[Tensor, str] = {}
    names = {name: first.setdefault(p, name) for name, p in named.items()}
    persistent = {name for name in module.state_dict() if name not in named}
    facts = {
        "config": dataclasses.asdict(config),
        "names": names,
        "trained": [name for name, p in named.items() if p.requires_grad],
        "persistent": sorted(persistent),
        "strides": {name: p.stride() for name, p in named.items()},
        "optimizer": [given.__module__, given.__qualname__],
        "members": [[first[p] for p in group["params"]] for group in optimizer.param_groups],
    }
    tensors = {
        name: tensor.detach()
        for name, tensor in {**named, **dict(module.named_buffers())}.items()
        if name not in names or names[name] == name
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {first[p]: entries for p, entries in optimizer.state.items() if p in first}
    own = {
        "words": json.dumps(facts),
        "tensors": tensors,
        "groups": keeping.pack([groups, optimizer.defaults], "the optimizer's groups"),
        "state": keeping.pack(state, "the optimizer"),
    }
    return RankState(-1, Place(), rng.capture(), own=own).pack()


def build(blob: bytes) -> tuple[Config, nn.Module, Optimizer]:
    """Return the settings, a module with the described parameters and buffers, and the optimizer.

    Sets the random streams of this process to the describer's.
    """
    description = RankState.unpack(blob)
    facts: dict[str, Any] = json.loads(description.own["words"])
    model, parameters = nn.Module(), dict[str, nn.Parameter]()
    for name, own in facts["names"].items():
        if own not in parameters:
            tensor = description.own["tensors"][own]
            laid = torch.empty_strided(tensor.shape, facts["strides"][own], dtype=tensor.dtype).copy_(tensor)
            parameters[own] = nn.Parameter(laid, requires_grad=own in facts["trained"])
        _home(model, name).register_parameter(name.rpartition(".")[2], parameters[own])
    for name, tensor in description.own["tensors"].items():
        if name not in facts["names"]:
            _home(model, name).register_buffer(name.rpartition(".")[2], tensor, persistent=name in facts["persistent"])
    groups, defaults = keeping.unpack(description.own["groups"])
    for group, members in zip(groups, facts["members"], strict=True):
        group["params"] = [parameters[name] for name in members]
        group.pop("param_names", None)
    module, qualname = facts["optimizer"]
    given: Any = getattr(importlib.import_module(module), qualname)
    optimizer: Optimizer = object.__new__(given)
    Optimizer.__init__(optimizer, groups, defaults)
    for name, entries in keeping.unpack(description.own["state"]).items():
        optimizer.state[parameters[name]] = entries
    rng.restore(description.streams)
    return _config(facts["config"]), model, optimizer


def _home(model: nn.Module, name: str) -> nn.Module:
    """Return the module that contains the name, creating it and its parents if necessary."""
    for part in name.split(".")[:-1]:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]  # type: ignore[assignment]
    return model


def _config(tree: Mapping[str, Any]) -> Config:
    """Return the settings, given their fields as nested dicts."""
    groups = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING}
    named = {key: groups[key](**value) if isinstance(value, dict) else value for key, value in tree.items()}
    return Config(**{**named, "metrics": tuple(tree["metrics"])})
