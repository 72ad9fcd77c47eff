"""State as plain trees by parameter name, and back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpips import checkpoint
from mpips.comm.simulated import World
from mpips.config import Config
from mpips.model.message import Replica, replicate
from mpips.optim import snapshot
from mpips.optim.snapshot import SnapshotError
from tests.helpers.programs import Transformer, cnn, mlp

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.integers() | st.text(max_size=4)
trees = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=10,
)  # fmt: skip


def replica(net: nn.Module) -> Replica:
    return replicate(net, Config(), 1, World(1).ends[0].allocate)


@given(trees)
def test_json_keeps_keys_counters_and_numbers(tree: Any) -> None:
    again = snapshot.from_json(snapshot.to_json(tree))
    assert again == tree
    assert type(again) is type(tree)


def test_json_of_what_schedulers_hold() -> None:
    given = {"milestones": Counter({3: 2, 9: 1}), "best": float("inf"), "lr": torch.tensor(0.1), 5: (1, [2.5]), "dict": {}}
    again = snapshot.from_json(snapshot.to_json(given))
    assert isinstance(again["milestones"], Counter)
    assert again == {**given, "lr": torch.tensor(0.1).item(), 5: [1, [2.5]]}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_whole_and_by_name(tied: bool) -> None:
    first = Transformer() if tied else _frozen_cnn()
    own = replica(first)
    with torch.no_grad():
        for tensor in [*first.parameters(), *first.buffers()]:
            tensor.add_(1)
    path = checkpoint.save(Path(), 1, snapshot.take_model(own))
    tree = checkpoint.load(path)
    assert {**tree["parameters"], **tree["buffers"]}.keys() == first.state_dict().keys()
    second = Transformer() if tied else _frozen_cnn()
    other = replica(second)
    before = [p.data_ptr() for p in second.parameters()]
    snapshot.put_model(tree, other)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert [p.data_ptr() for p in second.parameters()] == before  # still views
    assert all(torch.equal(a, b) for a, b in zip(other.pull.buffers, second.buffers(), strict=True))


def _frozen_cnn() -> nn.Module:
    net = cnn()
    net[1].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(("kind", "name", "value", "saved"), [
    ("parameters", "5.bias", None, "nothing"),
    ("parameters", "new", torch.ones(2), "torch.float32 (2,)"),
    ("parameters", "5.bias", torch.ones(4), "torch.float32 (4,)"),
    ("parameters", "5.bias", torch.ones(5).double(), "torch.float64 (5,)"),
    ("parameters", "5.bias", 3, "nothing"),
    ("buffers", "2.running_var", None, "nothing"),
], ids=range(6))  # fmt: skip
def test_another_model_s_snapshot_changes_nothing(kind: str, name: str, value: Any, saved: str) -> None:
    tree = {kind: {n: t.clone() + 1 for n, t in named.items()} for kind, named in snapshot.take_model(replica(cnn())).items()}
    tree[kind].pop(name, None)
    tree[kind] |= {} if value is None else {name: value}
    net = cnn()
    own = replica(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(SnapshotError) as error:
        snapshot.put_model(tree, own)
    assert f"{kind[:-1]} {name}: the checkpoint has {saved}, the model" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_optimizer_state_is_found_by_name_and_not_by_place() -> None:
    net = mlp()
    names = {p: name for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.8, 0.7))
    net(torch.ones(1, 12)).sum().backward()
    net[0].bias.grad = None  # no state for this one
    optimizer.step()
    tree = snapshot.take_optimizer(optimizer, "Adam", names)
    assert tree["class"] == "Adam"
    assert tree["state"].keys() == {"0.weight", "2.weight", "2.bias"}
    assert torch.equal(tree["state"]["2.bias"]["exp_avg"], optimizer.state[net[2].bias]["exp_avg"])
    other = mlp()
    fresh = torch.optim.Adam(other.parameters())
    tree["state"] = dict(reversed(tree["state"].items()))
    snapshot.put_optimizer(tree, fresh, "Adam", {p: name for name, p in other.named_parameters()})
    assert fresh.param_groups[0]["betas"] == (0.8, 0.7)
    assert other[0].bias not in fresh.state
    for name, p in other.named_parameters():
        for key, value in fresh.state.get(p, {}).items():
            assert torch.equal(value, optimizer.state[dict(net.named_parameters())[name]][key]), (name, key)


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)], ids=["float32", "float64"])
def test_tensors_in_groups_stay_tensors_of_their_dtype(lr: torch.Tensor) -> None:
    net = mlp()
    names = {p: name for name, p in net.named_parameters()}
    tree = snapshot.take_optimizer(torch.optim.Adam(net.parameters(), lr=lr), "Adam", names)
    fresh = torch.optim.Adam(net.parameters(), lr=torch.zeros_like(lr))
    snapshot.put_optimizer(tree, fresh, "Adam", names)
    assert fresh.param_groups[0]["lr"].dtype == lr.dtype
    assert torch.equal(fresh.param_groups[0]["lr"], lr)
