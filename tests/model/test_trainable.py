"""Fine-tuning: what a pattern trains, and that a round costs what is trained and not what is frozen."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips import checkpoint
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.config import ConfigError
from mpips.model.buffers import LIMBS
from mpips.model.flat import ALIGNMENT, Flat
from mpips.model.message import COLUMNS, CONTROL_BYTES
from mpips.model.trainable import freeze
from mpips.optim import hyperparameters as hyper
from tests.helpers.programs import OPTIMIZERS, Transformer, data, in_order, mlp, plain, sha

ADAPTERS = ["*.lora_*", "head.*"]


class LoRALinear(nn.Module):
    """y = base(x) + scale (x A^T) B^T, with peft's names."""

    def __init__(self, base: nn.Linear, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / 4)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(self.base.weight.dtype)).to(x.dtype) + x @ self.lora_A.T @ self.lora_B.T * self.scale


class Adapted(nn.Module):
    """A base of 200,576 parameters with adapters and a head of 3,997."""

    def __init__(self, seed: int = 11) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            LoRALinear(nn.Linear(12, 256)),
            nn.ReLU(),
            LoRALinear(nn.Linear(256, 512)),
            nn.Dropout(0.1),
            nn.ReLU(),
            LoRALinear(nn.Linear(512, 128)),
        )
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.arange(6, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 2)


def states(net: nn.Module) -> dict[str, tuple[bool, Tensor | None]]:
    return {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}


CHOSEN: dict[str, tuple[Any, list[str]]] = {
    "glob": ("2.*", ["2.weight", "2.bias"]),
    "end": ("*.bias", ["0.bias", "2.bias"]),
    "name": ("2.bias", ["2.bias"]),
    "several, in the model's order": (["2.bias", "0.w*"], ["0.weight", "2.bias"]),
    "overlapping": (("*", "2.bias"), ["0.weight", "0.bias", "2.weight", "2.bias"]),
    "regex": (re.compile(r"^2\.(weight|bias)$"), ["2.weight", "2.bias"]),
    "regex inside": (re.compile("bi"), ["0.bias", "2.bias"]),
    "regex and glob": ([re.compile("0.b"), "2.b*"], ["0.bias", "2.bias"]),
    "function": (lambda name, p: p.numel() > 100, ["0.weight", "2.weight"]),
    "function of what was": (lambda name, p: name.endswith("bias") and not p.requires_grad, ["2.bias"]),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_names_that_match_are_trained_and_all_others_frozen_whatever_they_were(case: str) -> None:
    trainable, names = CHOSEN[case]
    net = mlp()
    net(data(8)[0]).sum().backward()
    net[2].requires_grad_(False)
    assert freeze(net, trainable) == names
    for name, (trained, grad) in states(net).items():
        assert trained == (name in names)
        assert (grad is not None) == trained
    assert [slot.name for slot in Flat(net).slots] == names


@pytest.mark.parametrize("wrap", [
    nn.DataParallel,
    lambda net: torch.compile(net, backend="eager"),
    lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:]),
], ids=["DataParallel", "compiled", "compiled inside"])  # fmt: skip
def test_names_are_the_users_own_in_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert freeze(wrap(mlp()), ["0.bias", "2.*"]) == ["0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("pattern", ["embed.*", "head.*"])
def test_any_name_of_a_tied_parameter_trains_it(pattern: str) -> None:
    net = Transformer()
    assert freeze(net, pattern) == ["embed.weight"]
    assert net.head.weight.requires_grad


def test_a_tied_parameter_is_not_frozen_by_the_name_that_does_not_match() -> None:
    assert freeze(Transformer(), lambda name, p: name == "head.weight") == ["embed.weight"]


def test_parameters_that_can_have_no_gradient_stay_frozen_beside_others() -> None:
    net = Quantised()
    assert freeze(net, "*") == ["scales", "head.weight", "head.bias"]
    assert not net.codes.requires_grad


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "misspelt": ("clasifier.*", ["'clasifier.*'", "classifier.weight", "classifier.bias"]),
    "a module": ("classifier", ["'classifier'", "classifier.weight"]),
    "letter case": ("Classifier.*", ["'Classifier.*'", "classifier.weight"]),
    "one of two": (["classifier.*", "*.lora_C"], ["'*.lora_C'", "body.lora_A", "body.lora_B"]),
    "regex": (re.compile("^lora_A"), ["'^lora_A'", "body.lora_A"]),
    "two lines": ("two\nlines", ["two\\nlines", "nearest names"]),
    "integers": ("*.codes", ["'*.codes'", "can have a gradient", "inner.codes is torch.int8"]),
    "integers beside others": (["classifier.*", "*.codes"], ["'*.codes'", "inner.codes is torch.int8"]),
    "function": (lambda name, p: False, ["lambda", "nearest names"]),
    "empty": ([], ["[]", "name pattern", "function"]),
    "none": (None, ["None", "name pattern"]),
    "number": (["classifier.*", 3], ["given 3", "name pattern"]),
    "dict": ({"classifier": True}, ["a dict", "name pattern"]),
    "bytes": (re.compile(b"classifier"), ["b'classifier'", "name pattern"]),
    "the module itself": (nn.Sequential(nn.Linear(2, 2)), ["a Sequential", "name pattern"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_trains_nothing_is_refused_in_one_line(case: str) -> None:
    trainable, words = REFUSED[case]
    net = nn.ModuleDict({"body": LoRALinear(nn.Linear(6, 6)), "inner": Quantised(), "classifier": nn.Linear(6, 2)})
    net["body"].base.requires_grad_(False)
    before = states(net)
    with pytest.raises(ConfigError) as error:
        freeze(net, trainable)
    text = str(error.value)
    assert text.startswith("trainable: given ")
    assert "allowed: " in text
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert states(net) == before


def test_a_model_without_parameters_has_no_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        freeze(nn.ReLU(), "*")


def finetune(communicator: Communicator, epochs: int = 2, net: nn.Module | None = None, **settings: Any) -> dict[str, Any]:
    """Fine-tune adapters; every rank's base is its own until connect, and the optimizer is given all parameters."""
    net = net or Adapted(seed=11 + communicator.rank)
    start = {name: t.clone() for name, t in net.state_dict().items()}
    names = freeze(net, ADAPTERS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    ps = mpips.connect(net, optimizer, communicator=communicator, **{"run_dir": "run", **settings})
    rounds = []
    for _ in ps.epochs(epochs):
        for x, y in ps.batches(data(), 16):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            before = dict(communicator.traffic)
            ps.step(loss)
            rounds.append({call: n - before.get(call, 0) for call, n in communicator.traffic.items()})
    state = [t.numel() for kept in optimizer.state.values() for t in kept.values() if t.dim()]
    return {"net": net, "start": start, "names": names, "rounds": rounds, "state": sum(state), "folder": ps.folder}


def sizes(net: nn.Module) -> tuple[int, int, int]:
    """Trained and frozen elements, and how many tensors are trained."""
    trained = [p.numel() for p in net.parameters() if p.requires_grad]
    return sum(trained), sum(p.numel() for p in net.parameters() if not p.requires_grad), len(trained)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_round_and_the_optimizer_cost_what_is_trained(size: int) -> None:
    results = World(size).run(finetune)
    trained, frozen, tensors = sizes(results[0]["net"])
    assert (trained, frozen) == (3997, 200576)
    saved = newest(results[0]["folder"])["optimizer"]["state"].values()
    assert sum(t.numel() for kept in saved for t in kept.values() if t.dim()) == 2 * trained  # AdamW's two moments,
    assert [r["state"] for r in results] == ([2 * trained] if size == 1 else [0] * (size - 1))  # on the server alone
    padding = tensors * ALIGNMENT
    numbers = len(hyper.read(torch.optim.AdamW([torch.zeros(1)])))
    tail = 4 * (tensors + size * (len(COLUMNS) + LIMBS * numbers) + LIMBS + 1)
    for result in results:
        assert len(result["rounds"]) == 2 * -(-20 // max(1, size - 1))
        for moved in result["rounds"]:
            assert moved["reduce calls"] == moved["broadcast calls"] == 1
            assert 4 * trained <= moved["reduce bytes"] <= 4 * trained + padding + tail
            assert 4 * trained <= moved["broadcast bytes"] <= 4 * trained + padding + CONTROL_BYTES
            assert moved["reduce bytes"] + moved["broadcast bytes"] < 0.025 * 2 * 4 * (trained + frozen)


@pytest.mark.parametrize("size", [1, 3])
def test_frozen_weights_are_the_servers_bit_for_bit_on_all_ranks(size: int) -> None:
    results = World(size).run(finetune)
    start = Adapted(seed=11).state_dict()  # rank 0's
    for result in results:
        end, names = result["net"].state_dict(), set(result["names"])
        assert {name for name in end if not torch.equal(end[name], start[name])} == names
        assert all(p.grad is None for p in result["net"].parameters() if not p.requires_grad)
    assert len({sha(result["net"]) for result in results}) == 1


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_holds_all_weights_and_the_state_of_the_trained_and_resumes(size: int) -> None:
    whole = World(size).run(lambda e: finetune(e, 2, run_dir="whole"))[0]
    part = World(size).run(lambda e: finetune(e, 1, run_dir="part"))[0]
    saved = newest(part["folder"])
    now = {name: p.detach() for name, p in part["net"].named_parameters()}
    assert saved["parameters"].keys() == now.keys()
    assert all(torch.equal(saved["parameters"][name], p) for name, p in now.items())
    state = saved["optimizer"]["state"]
    assert list(state) == part["names"]
    assert all(state[name]["exp_avg"].shape == now[name].shape for name in state)
    resumed = World(size).run(lambda e: finetune(e, 2, Adapted(seed=99), run_dir="part", resume="auto"))
    assert {sha(result["net"]) for result in resumed} == {sha(whole["net"])}
    again, expected = (newest(folder)["optimizer"]["state"] for folder in (part["folder"], whole["folder"]))
    for name in whole["names"]:
        assert all(torch.equal(again[name][key], expected[name][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def newest(folder: Path) -> dict[str, Any]:
    path = checkpoint.newest(folder / "checkpoints")
    assert path is not None
    return checkpoint.load(path)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 base", "bfloat16 base"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_plain_pytorch_fine_tuning(optimizer: str, dtype: torch.dtype, size: int) -> None:
    """Adapters in float32 on a base in either dtype, against the ordinary loop with an optimizer of the adapters alone."""

    def made() -> nn.Module:
        torch.manual_seed(11)
        net = nn.Sequential(LoRALinear(nn.Linear(12, 33).to(dtype)), nn.ReLU(), nn.Linear(33, 5))
        freeze(net, ["*.lora_*", "2.*"])
        return net

    def ours(communicator: Communicator) -> str:
        net = made()
        ps = mpips.connect(net, OPTIMIZERS[optimizer](net.parameters()), communicator=communicator, run_dir="run")
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(), 16, shuffle=False):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                ps.step(loss)
        return digest(net)

    net = made()
    plain(net, OPTIMIZERS[optimizer]([p for p in net.parameters() if p.requires_grad]), in_order(data(), 16, 2))
    assert World(size).run(ours) == [digest(net)]


def digest(net: nn.Module) -> str:
    """`sha`, where numpy has no bfloat16."""
    return sha(copy.deepcopy(net).float())


def test_ranks_that_train_different_parameters_are_refused_by_name() -> None:
    def program(communicator: Communicator) -> None:
        net = mlp()
        freeze(net, "0.*" if communicator.rank else "2.*")
        mpips.connect(net, OPTIMIZERS["sgd"](net.parameters()), communicator=communicator, run_dir="run")

    with pytest.raises(RuntimeError, match=r"rank 0 has `parameter 2\.weight .*rank 1 has `parameter 0\.weight"):
        World(2).run(program)
