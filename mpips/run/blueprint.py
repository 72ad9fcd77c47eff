"""A model and its optimizer in words: so a server, which has left the script, can serve a further run of it.

Rank 0 builds its first model by the script. Of a later one it needs only names, tensors and the optimizer's class; the forward
pass stays with the workers.
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
from mpips.optim.flat_optimizer import kind
from mpips.process import rng
from mpips.run import keeping
from mpips.server.rank_state import RankState


def describe(config: Config, model: nn.Module, optimizer: Optimizer) -> bytes:
    """What a server needs of a run.

    Raises:
        ConfigError: an optimizer of a class that is not torch's, which may hold anything.
    """
    given, module = kind(optimizer), unwrap(model)
    if not given.__module__.startswith("torch.optim."):
        raise ConfigError(
            f"optimizer: given a {given.__name__} to a second connect, allowed: one of torch's there, as the server has left "
            f"the script; or server_trains"
        )
    named = dict(module.named_parameters(remove_duplicate=False))
    first: dict[Tensor, str] = {}
    names = {name: first.setdefault(p, name) for name, p in named.items()}
    persistent = {name for name in module.state_dict() if name not in named}
    words = {
        "config": dataclasses.asdict(config),
        "names": names,
        "trained": [name for name, p in named.items() if p.requires_grad],
        "persistent": sorted(persistent),
        "strides": {name: p.stride() for name, p in named.items()},
        "optimizer": [given.__module__, given.__qualname__],
        "members": [[first[p] for p in group["params"]] for group in optimizer.param_groups],
    }
    plain = {
        name: tensor.detach()
        for name, tensor in {**named, **dict(module.named_buffers())}.items()
        if name not in names or names[name] == name
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {first[p]: kept for p, kept in optimizer.state.items() if p in first}
    own = {
        "words": json.dumps(words),
        "tensors": plain,
        "groups": keeping.pack([groups, optimizer.defaults], "the optimizer's groups"),
        "state": keeping.pack(state, "the optimizer"),
    }
    return RankState(-1, Place(), rng.capture(), own=own).pack()


def build(blob: bytes) -> tuple[Config, nn.Module, Optimizer]:
    """The settings, a module with those parameters and buffers, and the optimizer; the random streams are the describer's."""
    said = RankState.unpack(blob)
    words: dict[str, Any] = json.loads(said.own["words"])
    model, parameters = nn.Module(), dict[str, nn.Parameter]()
    for name, own in words["names"].items():
        if own not in parameters:
            tensor = said.own["tensors"][own]
            laid = torch.empty_strided(tensor.shape, words["strides"][own], dtype=tensor.dtype).copy_(tensor)
            parameters[own] = nn.Parameter(laid, requires_grad=own in words["trained"])
        _home(model, name).register_parameter(name.rpartition(".")[2], parameters[own])
    for name, tensor in said.own["tensors"].items():
        if name not in words["names"]:
            _home(model, name).register_buffer(name.rpartition(".")[2], tensor, persistent=name in words["persistent"])
    groups, defaults = keeping.unpack(said.own["groups"])
    for group, members in zip(groups, words["members"], strict=True):
        group["params"] = [parameters[name] for name in members]
        group.pop("param_names", None)
    module, qualname = words["optimizer"]
    given: Any = getattr(importlib.import_module(module), qualname)
    optimizer: Optimizer = object.__new__(given)
    Optimizer.__init__(optimizer, groups, defaults)
    for name, kept in keeping.unpack(said.own["state"]).items():
        optimizer.state[parameters[name]] = kept
    rng.restore(said.streams)
    return _config(words["config"]), model, optimizer


def _home(model: nn.Module, name: str) -> nn.Module:
    """The module that a name lies in, made on the way."""
    for part in name.split(".")[:-1]:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]  # type: ignore[assignment]
    return model


def _config(tree: Mapping[str, Any]) -> Config:
    groups = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING}
    named = {key: groups[key](**value) if isinstance(value, dict) else value for key, value in tree.items()}
    return Config(**{**named, "metrics": tuple(tree["metrics"])})
