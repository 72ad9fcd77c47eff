"""The flat buffer: any model that plain PyTorch trains is trained alike, or refused by name."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpips
from mpips.checkpoint.layout import BITS, NATIVE
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.model.flat import ALIGNMENT, STORED, Flat, LayoutError, lay_out, unwrap
from tests.helpers.programs import OPTIMIZERS, data, mlp

Batches = list[Tensor]


class Odd(nn.Module):
    """A module of a few odd parameters; its output uses all of them."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for p in self.own:
            if p.is_floating_point() and p.numel():
                total = total + (p * x.mean()).tanh().sum() + (p**2).sum() / 7
        return total


class Scattered(nn.Module):
    """Which parameters get a gradient changes from step to step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.branches = nn.ModuleList(nn.Linear(12, 5) for _ in range(3))
        self.never = nn.Linear(12, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.branches[self.calls % 3](x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight
        self.three = self.two
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.one(x).relu()))


def frozen() -> nn.Module:
    net = mlp()
    net[0].weight.requires_grad_(False)
    return net


def channels_last() -> nn.Module:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2, padding=1), nn.Flatten(), nn.Linear(36, 5))
    return net.to(memory_format=torch.channels_last)


def noncontiguous() -> nn.Module:
    net = mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().t().contiguous().t())  # dense, transposed
    net[2].weight = nn.Parameter(torch.randn(5, 66)[:, ::2])  # not dense
    return net


def recurrent() -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Unflatten(1, (4, 3)), _Last(nn.LSTM(3, 6, batch_first=True)), nn.Linear(6, 5))


class _Last(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][:, -1]


def plain_loop(net: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[..., None], steps: int) -> None:
    """The oracle: `step` gets what it needs to do in plain PyTorch what the script does with mpips."""
    x, y = data(steps * 8)
    for number, batch in enumerate(zip(x.split(8), y.split(8), strict=True)):
        step(net, optimizer, number, *batch)


def ps_loop(
    communicator: Communicator, net: nn.Module, optimizer: Any, body: Callable[..., Any], steps: int, **settings: Any
) -> None:
    ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run", **settings)
    for _ in ps.epochs(1):
        for number, (x, y) in enumerate(ps.batches(data(steps * 8), 8, shuffle=False)):
            body(ps, net, number, x, y)


def tensors(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def simple(net: nn.Module, optimizer: torch.optim.Optimizer, number: int, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    _loss(net(x), y).backward()
    optimizer.step()


def simple_ps(ps: mpips.Run, net: nn.Module, number: int, x: Tensor, y: Tensor) -> None:
    loss = _loss(net(x), y)
    loss.backward()
    ps.step(loss)


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y) if out.dim() else out


def odd() -> nn.Module:
    torch.manual_seed(9)
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3)]
    frozen_one = nn.Parameter(torch.arange(4), requires_grad=False)
    return Odd(*(nn.Parameter(torch.randn(shape)) for shape in shapes), frozen_one)


MODELS = {
    "frozen": frozen, "tied": Tied, "scattered": Scattered, "channels-last": channels_last,
    "non-contiguous": noncontiguous, "odd shapes": odd, "recurrent": recurrent,
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])  # both would move a parameter without a gradient
@pytest.mark.parametrize("model", MODELS)
def test_odd_models_train_as_in_plain_pytorch(model: str, optimizer: str) -> None:
    net = MODELS[model]()
    other = copy.deepcopy(net)
    ps_loop(World(1).ends[0], net, OPTIMIZERS[optimizer](net.parameters()), simple_ps, 12)
    plain_loop(other, OPTIMIZERS[optimizer](other.parameters()), simple, 12)
    assert_same(net, other)


def test_a_parameter_without_a_gradient_on_one_worker_is_stepped_with_the_others_mean() -> None:
    """A worker's None counts as zeros; only what no worker has is passed over."""

    def program(communicator: Communicator) -> list[Tensor]:
        net = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
        for linear in net:
            nn.init.ones_(linear.weight)
        ps = mpips.connect(net, lambda p: torch.optim.AdamW(p, lr=0.1), communicator=communicator, run_dir="run")
        for _ in ps.epochs(1):
            for (x,) in ps.batches((torch.ones(4, 1),), 2):
                loss = sum(net[i](x).mean() for i in range(1 + ps.worker))
                loss.backward()
                ps.step(loss)
        return tensors(net)

    both, one, none = World(3).run(program)[0]
    oracle = nn.Parameter(torch.ones(1, 1))
    adam = torch.optim.AdamW([oracle], lr=0.1)
    oracle.grad = torch.full((1, 1), 0.5)  # one worker of two
    adam.step()
    assert torch.equal(one, oracle)
    assert torch.equal(none, torch.ones(1, 1))
    assert both.item() < 1


def habit(when: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """A user's way of dealing with gradients, with mpips and in plain PyTorch."""

    def ps_body(ps: mpips.Run, net: nn.Module, number: int, x: Tensor, y: Tensor) -> None:
        if when == "before forward":
            net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        if when == "before backward":
            net.zero_grad(set_to_none=True)
        if when == "zeros":
            net.zero_grad(set_to_none=False)
        if when == "a discarded backward":
            net(x).sum().backward(retain_graph=True)
            net.zero_grad()
        loss.backward()
        _edit(net, when, number)
        ps.step(loss)
        if when == "after the step":
            net.zero_grad()

    def body(net: nn.Module, optimizer: torch.optim.Optimizer, number: int, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=when != "zeros")
        F.cross_entropy(net(x), y).backward()
        _edit(net, when, number)
        optimizer.step()

    return ps_body, body


def _edit(net: nn.Module, when: str, number: int) -> None:
    parameters = list(net.parameters())
    if when == "clipped":
        nn.utils.clip_grad_norm_(parameters, 0.1)
    if when == "assigned":
        parameters[0].grad = parameters[0].grad * 2 + 1
    if when == "in place":
        parameters[1].grad.fill_(0.25)
    if when == "removed" and number % 2:
        parameters[2].grad = None
    if when == "cleared at last" and number % 2:
        net.zero_grad()
    if when == "transposed":
        parameters[0].grad = torch.ones(12, 33).t()


HABITS = [
    "before forward", "before backward", "zeros", "a discarded backward", "after the step", "clipped", "assigned",
    "in place", "removed", "cleared at last", "transposed",
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("when", HABITS)
def test_what_a_user_does_to_gradients_means_what_it_means_in_plain_pytorch(when: str, size: int) -> None:
    ours, plain = habit(when)

    def program(communicator: Communicator) -> nn.Module:
        net = mlp()
        ps_loop(communicator, net, OPTIMIZERS["momentum"](net.parameters()), ours, 6)
        return net

    other = mlp()
    plain_loop(other, OPTIMIZERS["momentum"](other.parameters()), plain, 6)
    for net in World(size).run(program):
        assert_same(net, other)


@pytest.mark.parametrize("seed", range(5))
def test_zero_grad_at_any_place_and_on_any_rank(seed: int) -> None:
    """Calls that leave no gradient behind in plain PyTorch change nothing here: also on a rank that only serves."""

    def program(communicator: Communicator) -> nn.Module:
        chance = random.Random(seed * 10 + communicator.rank)
        net = mlp()
        optimizer = OPTIMIZERS["adam"](net.parameters())
        clear = [net.zero_grad, optimizer.zero_grad, lambda: net.zero_grad(set_to_none=False), lambda: None]
        ps = mpips.connect(net, optimizer, communicator=communicator, run_dir="run")
        for _ in ps.epochs(2):
            chance.choice(clear)()
            for x, y in ps.batches(data(48), 8, shuffle=False):
                chance.choice(clear)()
                loss = F.cross_entropy(net(x), y)
                chance.choice(clear)()
                loss.backward()
                ps.step(loss)
                chance.choice(clear)()
            ps.validate(lambda: chance.choice(clear)() or 0.0)
        return net

    other = mlp()
    optimizer = OPTIMIZERS["adam"](other.parameters())
    for _ in range(2):
        plain_loop(other, optimizer, simple, 6)
    for net in [*World(1).run(program), *World(2).run(program)]:
        assert_same(net, other)


@pytest.mark.parametrize("clear", [False, True], ids=["kept", "zero_grad"])
def test_accumulation_over_several_backwards_also_across_the_end_of_an_epoch(clear: bool) -> None:
    def program(communicator: Communicator) -> nn.Module:
        net = mlp()
        ps = mpips.connect(net, OPTIMIZERS["adam"](net.parameters()), communicator=communicator, run_dir="run")
        number = 0
        for _ in ps.epochs(2):
            for x, y in ps.batches(data(5 * 8), 8, shuffle=False):  # 5 batches, a step at every third: 4 are left over
                loss = F.cross_entropy(net(x), y) / 3
                loss.backward()
                number += 1
                if number % 3 == 0:
                    ps.step(loss, samples=24)
                    net.zero_grad() if clear else None
        return net

    other = mlp()
    optimizer = OPTIMIZERS["adam"](other.parameters())
    x, y = data(5 * 8)
    for number in range(10):
        part = slice(number % 5 * 8, number % 5 * 8 + 8)
        (F.cross_entropy(other(x[part]), y[part]) / 3).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    for net in [*World(1).run(program), *World(2).run(program)]:
        assert_same(net, other)


def test_gradients_left_over_wait_while_longer_shards_go_on() -> None:
    """Worker 0 has one batch and no step; it idles through worker 1's rounds, in which its gradients must not appear."""
    seen: dict[int, list[Tensor]] = {}

    def program(communicator: Communicator) -> None:
        net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(net.weight)
        ps = mpips.connect(
            net, lambda p: torch.optim.SGD(p, lr=1.0), communicator=communicator, run_dir="run", server_trains=True
        )
        own = torch.ones(1, 1) * 100 if ps.worker == 0 else torch.ones(4, 1)
        for _ in ps.epochs(1):
            for (x,) in ps.batches((own,), 1, shard=False):
                loss = net(x).sum()
                net.zero_grad()
                loss.backward()
                if ps.worker == 1:
                    ps.step(loss)
        seen[communicator.rank] = [net.weight.detach().clone(), net.weight.grad]

    World(2).run(program)
    assert [seen[rank][0].item() for rank in (0, 1)] == [-4.0, -4.0]
    assert seen[0][1].item() == 100.0
    assert seen[1][1] is None


def masters_loop(net: nn.Module, optimizer: str, steps: int) -> None:
    """The oracle for half precision: float32 masters, the gradient cast up, the model a cast down."""
    masters = [nn.Parameter(p.detach().float()) for p in net.parameters()]
    made = OPTIMIZERS[optimizer](masters)
    x, y = data(steps * 8)
    dtype = next(net.parameters()).dtype
    for a, b in zip(x.to(dtype).split(8), y.split(8), strict=True):
        net.zero_grad()
        F.cross_entropy(net(a).float(), b).backward()
        for master, p in zip(masters, net.parameters(), strict=True):
            master.grad = p.grad.float()
        made.step()
        with torch.no_grad():
            for master, p in zip(masters, net.parameters(), strict=True):
                p.copy_(master)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("made", ["instance", "function"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models_have_float32_masters(dtype: torch.dtype, optimizer: str, made: str, size: int) -> None:
    def program(communicator: Communicator) -> nn.Module:
        net = mlp().to(dtype)
        make = OPTIMIZERS[optimizer]
        given = make(net.parameters()) if made == "instance" else make
        ps = mpips.connect(net, given, communicator=communicator, run_dir="run")
        x, y = data(80)
        for _ in ps.epochs(1):
            for a, b in ps.batches((x.to(dtype), y), 8, shuffle=False):
                net.zero_grad()
                given.zero_grad() if made == "instance" else None
                loss = F.cross_entropy(net(a).float(), b)
                loss.backward()
                ps.step(loss)
        return net

    other = mlp().to(dtype)
    masters_loop(other, optimizer, 10)
    for net in World(size).run(program):
        assert_same(net, other)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters() -> None:
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    ps = mpips.connect(net, lambda p: torch.optim.SGD(p, lr=2**-12), communicator=World(1).ends[0], run_dir="run")
    for _ in ps.epochs(1):
        for (x,) in ps.batches((torch.ones(64, 1).bfloat16(),), 1):
            loss = net(x).sum()
            loss.backward()
            ps.step(loss)
    assert net.weight.item() == 1 - 64 * 2**-12


def bytes_moved(net: nn.Module, steps: int) -> int:
    """Bytes that a worker hands over in a run of so many rounds."""

    def program(communicator: Communicator) -> int:
        model = copy.deepcopy(net)
        ps_loop(communicator, model, OPTIMIZERS["sgd"](model.parameters()), simple_ps, steps)
        return sum(n for call, n in communicator.traffic.items() if call.endswith("bytes"))

    return World(2).run(program)[0]


def test_frozen_parameters_travel_once() -> None:
    small, large = mlp(), mlp()
    large.append(nn.Linear(5, 1000).requires_grad_(False))
    large[-1].forward = lambda x: x  # type: ignore[method-assign]
    extra = 6000 * 4
    for steps in (3, 9):
        assert bytes_moved(large, steps) - bytes_moved(small, steps) == extra


def test_tied_parameters_have_one_slot_and_two_names() -> None:
    flat = Flat(Tied())
    assert [slot.name for slot in flat.slots] == ["one.weight", "one.bias", "two.bias", "head.weight", "head.bias"]
    assert flat.aliases == {
        "two.weight": "one.weight", "three.weight": "one.weight", "three.bias": "two.bias",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_slots_begin_on_64_byte_boundaries_and_do_not_overlap(dtype: torch.dtype) -> None:
    shapes = [(1,), (0,), (16,), (17,), (5, 7), (), (128,), (129,)]
    named = [(str(i), torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)]
    slots, numel = lay_out(named)
    flat = torch.zeros(numel, dtype=dtype)
    for slot, (_, tensor) in zip(slots, named, strict=True):
        assert slot.offset * flat.element_size() % ALIGNMENT == 0
        slot.view(flat).copy_(tensor)
    for slot, (_, tensor) in zip(slots, named, strict=True):
        assert torch.equal(slot.view(flat), tensor)
    assert numel * flat.element_size() % ALIGNMENT == 0
    assert torch.count_nonzero(flat) == sum(torch.count_nonzero(tensor) for _, tensor in named)


def test_a_slot_of_a_part_of_a_larger_tensor_is_in_that_part() -> None:
    whole = torch.zeros(100)
    slots, numel = lay_out([("a", torch.zeros(3)), ("b", torch.zeros(2, 2))])
    slots[1].view(whole[20 : 20 + numel]).fill_(1)
    assert whole.nonzero().flatten().tolist() == [36, 37, 38, 39]


@pytest.mark.parametrize("model", ["tied", "channels-last", "non-contiguous", "odd shapes"])
def test_parameters_and_gradients_are_views_and_stay_so(model: str) -> None:
    """No step copies the model: data and gradients are where they were, each with its own shape and strides."""
    net = MODELS[model]()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    strides = {name: p.stride() for name, p in net.named_parameters() if p.is_contiguous() or model == "channels-last"}
    places: set[tuple[int, ...]] = set()

    def body(ps: mpips.Run, net: nn.Module, number: int, x: Tensor, y: Tensor) -> None:
        simple_ps(ps, net, number, x, y)
        replica = ps._worker.replica
        for slot, p in zip(replica.flat.slots, replica.flat.parameters, strict=True):
            assert p.grad is None, "nothing to zero"
            (p * 1.0).sum().backward()
            if not p.numel():
                continue
            for tensor, flat in ((p.data, replica.pull.weights), (p.grad, replica.push.gradients)):
                assert tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
                assert tensor.storage_offset() == flat.storage_offset() + slot.offset
        places.add(tuple(t.data_ptr() for p in replica.flat.parameters for t in (p, p.grad)))
        replica.flat.clear()

    ps_loop(World(1).ends[0], net, OPTIMIZERS["adam"](net.parameters()), body, 4)
    assert len(places) == 1
    assert {name: p.shape for name, p in net.named_parameters()} == shapes
    assert {name: p.stride() for name, p in net.named_parameters() if name in strides} == strides


def refused(kind: str) -> nn.Module:
    base = torch.randn(12)
    net = mlp()
    if kind == "several dtypes":
        net[2].double()
    elif kind == "complex":
        net[0].weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    elif kind == "the same memory":
        net[2].bias = nn.Parameter(net[0].bias.data[:5])
    elif kind == "overlap":
        return Odd(nn.Parameter(base[:8]), nn.Parameter(base[4:]))
    elif kind == "a frozen alias":
        net[2].bias = nn.Parameter(net[0].bias.data, requires_grad=False)
    elif kind == "a buffer":
        net.register_buffer("shadow", net[0].bias.data[2:4])
    elif kind == "nothing to train":
        net.requires_grad_(False)
    elif kind == "sparse":
        net[0].weight = nn.Parameter(torch.zeros(2, 2).to_sparse())
    elif kind == "device":
        net[2] = nn.Linear(33, 5, device="meta")
    return net


@pytest.mark.parametrize(("kind", "words"), [
    ("several dtypes", ["2.weight is torch.float64", "0.weight is torch.float32", "cast"]),
    ("complex", ["parameter 0.weight is torch.complex64", "view_as_real"]),
    ("the same memory", ["0.bias", "2.bias", "share memory", "one Parameter"]),
    ("overlap", ["own.0", "own.1", "share memory"]),
    ("a frozen alias", ["0.bias", "2.bias", "share memory"]),
    ("a buffer", ["0.bias", "shadow", "share memory"]),
    ("nothing to train", ["no trainable parameter", "requires_grad=True"]),
    ("sparse", ["parameter 0.weight has layout torch.sparse_coo", "to_dense()"]),
    ("device", ["parameter 2.weight is on the meta device", "to_empty"]),
])  # fmt: skip
def test_models_that_cannot_be_laid_out_are_refused_by_name(kind: str, words: list[str]) -> None:
    net = refused(kind)
    before = [p.data_ptr() for p in net.parameters() if p.layout == torch.strided]
    with pytest.raises(LayoutError) as error:
        Flat(net)
    assert all(word in str(error.value) for word in words), error.value
    assert [p.data_ptr() for p in net.parameters() if p.layout == torch.strided] == before


PARTS = [torch.ones(2), torch.ones(3)]
ODD = {  # how it is made, and what is said of it
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "is quantised, torch.qint8; .*int_repr",
    ),
    "coo": (lambda: torch.eye(3).to_sparse(), "has layout torch.sparse_coo; .*to_dense"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "has layout torch.sparse_csr; .*to_dense"),
    "nested": (lambda: torch.nested.nested_tensor(PARTS), "is a nested tensor; .*pad it"),
    "jagged": (lambda: torch.nested.nested_tensor(PARTS, layout=torch.jagged), "is a nested tensor; .*pad it"),
    "meta": (lambda: torch.ones(3, device="meta"), "is on the meta device, .*to_empty"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "is torch.complex64, .*view_as_real"),
    "an 8 bit float": (lambda: torch.ones(3).to(torch.float8_e4m3fnuz), "is torch.float8_e4m3fnuz, .*cast it"),
    "expanded": (lambda: torch.ones(1).expand(4), "is expanded, .*clone"),
    "lazy buffer": (nn.parameter.UninitializedBuffer, "has no shape yet; .*run one batch"),
}
PLAIN = {
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.ones(3).to(torch.uint16),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "no elements": lambda: torch.ones(0, 3),
    "a scalar": lambda: torch.tensor(3.0),
    "transposed": lambda: torch.ones(4, 3).t(),
    "every second": lambda: torch.ones(8)[::2],
    "for inference": lambda: torch.inference_mode()(torch.ones)(3),
}


def with_buffer(tensor: Tensor, persistent: bool = True) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_buffer("odd", tensor, persistent=persistent)
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_cannot_be_sent_or_saved_is_refused_by_name(kind: str) -> None:
    make, why = ODD[kind]
    with pytest.raises(LayoutError, match=f"^buffer 0.odd {why}.*persistent=False.*$"):
        Flat(with_buffer(make()))
    Flat(with_buffer(make(), persistent=False))  # a constant of the script's
    if kind in ("nested", "jagged", "lazy buffer"):  # no parameters
        return
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_parameter("odd", nn.Parameter(make(), requires_grad=False))
    with pytest.raises(LayoutError, match=f"^parameter 0.odd {why}.*$"):
        Flat(net)


def test_a_lazy_parameter_is_refused_by_name() -> None:
    with pytest.raises(
        LayoutError, match=r"^parameter 1\.weight has no shape yet; before connect, .*run one batch through the model$"
    ):
        Flat(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)))


@pytest.mark.parametrize("kind", PLAIN)
def test_other_unusual_tensors_are_no_hindrance(kind: str) -> None:
    net = with_buffer(PLAIN[kind]())
    if kind != "for inference":
        net.register_parameter("frozen", nn.Parameter(PLAIN[kind](), requires_grad=False))
    assert Flat(net).numel == 32


def test_what_is_let_through_can_be_saved() -> None:
    assert {str(dtype).removeprefix("torch.") for dtype in STORED} == NATIVE | BITS.keys()


def test_frozen_tensors_of_another_dtype_or_in_one_memory_are_no_hindrance() -> None:
    net = mlp()
    net[2].requires_grad_(False).double()
    net.register_parameter("integer", nn.Parameter(torch.arange(3), requires_grad=False))
    net.register_buffer("a", torch.zeros(4))
    net.register_buffer("b", net.a[1:])
    columns = torch.randn(4, 6)
    net.register_parameter("left", nn.Parameter(columns[:, :3]))  # between each other in memory, but apart
    net.register_parameter("right", nn.Parameter(columns[:, 3:]))
    flat = Flat(net)
    assert [slot.name for slot in flat.slots] == ["left", "right", "0.weight", "0.bias"]
    assert torch.equal(net.right, columns[:, 3:])


@pytest.mark.parametrize("move", [
    lambda net: net.to(torch.bfloat16),
    lambda net: setattr(net[0].weight, "data", net[0].weight.data.clone()),
], ids=["to", "data"])  # fmt: skip
def test_a_parameter_that_leaves_the_buffer_is_an_error_and_not_a_run_that_trains_nothing(move: Callable[..., None]) -> None:
    net = mlp()
    ps = mpips.connect(net, OPTIMIZERS["sgd"](net.parameters()), communicator=World(1).ends[0], run_dir="run")
    move(net)
    flat = ps._worker.replica.flat
    with pytest.raises(LayoutError, match=r"0\.weight has left the flat buffer.*before connect"):
        flat.collect()


def test_load_state_dict_after_connect_writes_into_the_buffer() -> None:
    net, other = mlp(), mlp()
    nn.init.ones_(other[0].weight)
    flat = Flat(net)
    net.load_state_dict(other.state_dict())
    assert torch.equal(flat.slots[0].view(flat.weights), other[0].weight)


class Wrapped(nn.Module):
    """As Opacus' GradSampleModule and torch's DDP hold a model."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled, eager": lambda net: torch.compile(net, backend="eager"),
    "compiled, aot_eager": lambda net: torch.compile(net, backend="aot_eager"),
    "DataParallel": nn.DataParallel,
    "DDP": lambda net: Wrapped("module", net),
    "Opacus": lambda net: Wrapped("_module", net),
    "DDP of compiled": lambda net: Wrapped("module", torch.compile(net, backend="eager")),
    "compiled inside": lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:]),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrapped_models_train_alike_and_have_their_own_names(wrapping: str) -> None:
    net, other = mlp(), mlp()
    wrapped = WRAPPED[wrapping](net)
    assert [slot.name for slot in Flat(WRAPPED[wrapping](mlp())).slots] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    ps_loop(World(1).ends[0], wrapped, OPTIMIZERS["adam"](wrapped.parameters()), simple_ps, 6)
    plain_loop(other, OPTIMIZERS["adam"](other.parameters()), simple, 6)
    assert_same(net, other)


def test_a_model_compiled_and_called_before_connect_sees_the_moved_weights() -> None:
    net, other = mlp(), mlp()
    wrapped = torch.compile(net, backend="aot_eager")
    wrapped(data(8)[0]).sum().backward()
    net.zero_grad()
    ps_loop(World(1).ends[0], wrapped, OPTIMIZERS["adam"](wrapped.parameters()), simple_ps, 6)
    plain_loop(other, OPTIMIZERS["adam"](other.parameters()), simple, 6)
    assert_same(net, other)


@pytest.mark.parametrize("own", ["parameter", "buffer", "second child"])
def test_a_module_with_anything_of_its_own_is_no_wrapper(own: str) -> None:
    net = Wrapped("module", mlp())
    if own == "parameter":
        net.scale = nn.Parameter(torch.ones(1))
    elif own == "buffer":
        net.register_buffer("count", torch.ones(1))
    else:
        net.head = nn.Linear(5, 2)
    assert unwrap(net) is net


def test_sparse_gradients_are_made_dense() -> None:
    def make(sparse: bool) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(6, 12, sparse=sparse), nn.Flatten(), nn.Linear(12, 5))

    def body(ps: mpips.Run, net: nn.Module, number: int, x: Tensor, y: Tensor) -> None:
        net.zero_grad()  # else autograd adds into the dense view
        simple_ps(ps, net, number, y.view(-1, 1), y)

    def plainly(net: nn.Module, optimizer: torch.optim.Optimizer, number: int, x: Tensor, y: Tensor) -> None:
        simple(net, optimizer, number, y.view(-1, 1), y)

    net, other = make(True), make(False)
    ps_loop(World(1).ends[0], net, OPTIMIZERS["adam"](net.parameters()), body, 5)
    plain_loop(other, OPTIMIZERS["adam"](other.parameters()), plainly, 5)
    assert_same(net, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_nonfinite_slot_is_found(value: float) -> None:
    flat = Flat(mlp())
    gradients = torch.full_like(flat.grad, 1e25)  # its square overflows float32; it is finite
    assert flat.first_nonfinite(gradients) is None
    flat.slots[3].view(gradients)[1] = value
    assert flat.first_nonfinite(gradients) == 3
    flat.slots[1].view(gradients)[0] = value
    assert flat.first_nonfinite(gradients) == 1


def test_collect_says_which_parameters_have_a_gradient() -> None:
    net = mlp()
    flat = Flat(net)
    flat.clear()
    assert flat.collect() == [False] * 4
    net[2](net[0](torch.zeros(1, 12))).sum().backward()  # zero input: the first weight's gradient is there, and zero
    assert flat.pending
    assert flat.collect() == [True] * 4
    flat.clear()
    assert not flat.pending
    net[0].bias.grad = torch.ones_like(net[0].bias)  # by hand
    assert flat.collect() == [False, True, False, False]
    assert net[0].weight.grad is None
    net[0].bias.grad.zero_()  # torch steps on zeros
    assert flat.collect() == [False, True, False, False]
