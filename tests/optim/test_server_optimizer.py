"""The server's own optimizers against their papers' formulas, written down here once more for one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpips import checkpoint
from mpips.optim import snapshot
from mpips.optim.server_optimizer import FedAdagrad, FedAdam, FedYogi, SlowMo

SGD, Optimizer = torch.optim.SGD, torch.optim.Optimizer
MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "fedadagrad": lambda p: FedAdagrad(p, lr=0.3),
    "fedadagrad, momentum": lambda p: FedAdagrad(p, lr=0.3, momentum=0.7, tau=0.2),
    "fedyogi": lambda p: FedYogi(p, lr=0.3),
    "fedyogi, other": lambda p: FedYogi(p, lr=0.3, momentum=0.5, beta2=0.6, tau=0.2),
    "fedadam": lambda p: FedAdam(p, lr=0.3),
    "fedadam, other": lambda p: FedAdam(p, lr=0.3, momentum=0.5, beta2=0.6, tau=0.2),
    "slowmo": lambda p: SlowMo(p),
    "slowmo, other": lambda p: SlowMo(p, lr=0.7, momentum=0.8, inner_lr=0.3),
}
FED = [name for name in MAKE if name.startswith("fed")]


def fedopt(name: str, x: float, deltas: list[float], eta: float, b1: float, b2: float, tau: float) -> Iterator[float]:
    """Algorithm 2 of arXiv 2003.00295; a delta is mean(x_i) - x."""
    m, v = 0.0, tau**2
    for d in deltas:
        m = b1 * m + (1 - b1) * d
        if name == "FedAdagrad":
            v = v + d**2
        elif name == "FedYogi":
            v = v - (1 - b2) * d**2 * ((v > d**2) - (v < d**2))
        else:
            v = b2 * v + (1 - b2) * d**2
        x = x + eta * m / (math.sqrt(v) + tau)
        yield x


def slowmo(x: float, changes: list[float], gammas: list[float], alpha: float, beta: float) -> Iterator[float]:
    """Algorithm 1 of arXiv 1910.00643; a change is x_0 - mean(x_i)."""
    u = 0.0
    for change, gamma in zip(changes, gammas, strict=True):
        u = beta * u + change / gamma
        x = x - alpha * gamma * u
        yield x


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def changes(like: Tensor, number: int) -> Tensor:
    """The pseudo-gradient of round `number`: sizes from 1e-4 to 1e2."""
    generator = torch.Generator().manual_seed(100 + number)
    signs, sizes = (torch.randn(like.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (signs * 10 ** sizes.clamp(-3, 2)).to(like.dtype)


def steps(optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = changes(p, number)
        optimizer.step()


def one(
    make: Callable[[Any], Optimizer], grads: list[float], x: float = 0.0, dtype: torch.dtype = torch.float64
) -> list[float]:
    """A single number's way."""
    p = nn.Parameter(torch.tensor([x], dtype=dtype))
    optimizer, way = make([p]), []
    for grad in grads:
        p.grad = torch.tensor([grad], dtype=dtype)
        optimizer.step()
        way.append(p.item())
    assert p.dtype == dtype
    kept = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    assert all(value.dtype == dtype for key, value in kept if key != "step")
    return way


@pytest.mark.parametrize(("make", "grads", "moves"), [
    (lambda p: FedAdagrad(p, lr=1, tau=3), [4, 12, 84], [4 / (5 + 3), 12 / (13 + 3), 84 / (85 + 3)]),
    (lambda p: FedAdam(p, lr=1, momentum=0.5, beta2=0.5, tau=1), [1, 7, 35], [0.5 / 2, 3.75 / 6, 19.375 / 26]),
    (lambda p: FedYogi(p, lr=1, momentum=0, beta2=0, tau=3), [4, 3, -4], [4 / (5 + 3), 3 / (4 + 3), -4 / (4 + 3)]),
    (lambda p: SlowMo(p, lr=0.5, momentum=0.5, inner_lr=0.25), [1, 1, 0], [0.5 * 0.25 * u for u in (4, 6, 3)]),
    (lambda p: SGD(p, lr=1, momentum=0.5), [1, 1, 0], [1, 1.5, 0.75]),  # FedAvgM
], ids=["fedadagrad", "fedadam", "fedyogi", "slowmo", "fedavgm"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_worked_out_by_hand(make: Any, grads: list[float], moves: list[float], dtype: torch.dtype) -> None:
    """Squares that have whole roots. Yogi's second moment goes 9, 25, 16, 16: up, down, and neither if it is the square."""
    expected = [2 - sum(moves[: i + 1]) for i in range(3)]
    assert one(make, grads, 2.0, dtype) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", FED)
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_fedopt_family_is_the_paper_s(name: str, size: float) -> None:
    grads = [size * g for g in (1.0, -3.0, 0.2, 0.0, 1.5, 1e-3)]
    optimizer = MAKE[name]([nn.Parameter(torch.zeros(1))])
    group, kind = optimizer.param_groups[0], type(optimizer).__name__
    settings = [group[key] for key in ("lr", "momentum", "beta2", "tau")]
    expected = list(fedopt(kind, 2.0, [-g for g in grads], *settings))
    assert one(MAKE[name], grads, 2.0) == pytest.approx(expected, rel=1e-12)
    assert one(MAKE[name], grads, 2.0, torch.float32) == pytest.approx(expected, rel=2e-5)


def test_the_defaults_are_the_paper_s() -> None:
    p = parameters((1,))
    assert FedAdam(p, 1).defaults == FedYogi(p, 1).defaults == {"lr": 1, "momentum": 0.9, "beta2": 0.99, "tau": 1e-3}
    assert (FedAdagrad(p, 1).defaults["momentum"], FedAdagrad(p, 1).defaults["tau"]) == (0, 1e-3)
    assert (SlowMo(p).defaults["lr"], SlowMo(p).defaults["inner_lr"]) == (1, 1)


def test_fedadam_is_not_torch_s_adam() -> None:
    """torch corrects m and v for their start, so its first step is lr whatever the betas; the paper's is not."""
    grads = [1.0, 1.0, 1.0]
    plain = one(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3), grads)
    ours = one(lambda p: FedAdam(p, lr=0.1, momentum=0.9, beta2=0.99, tau=1e-3), grads)
    assert plain[0] == pytest.approx(-0.1, rel=2e-3)
    assert ours[0] == pytest.approx(-0.1 * 0.1 / (math.sqrt(0.99e-6 + 0.01) + 1e-3), rel=1e-9)
    assert all(abs(a - b) > 1e-3 for a, b in zip(ours[1:], plain[1:], strict=True))


def test_yogi_s_second_moment_moves_by_the_square_alone() -> None:
    """Far above the square Adam's shrinks by a share of itself, Yogi's by a share of the square."""

    def second(kind: Any) -> list[float]:
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, seen = kind([p], lr=1, beta2=0.75), []
        for grad in (10.0, 1.0, 0.0, 10.0):
            p.grad = torch.tensor([grad], dtype=torch.float64)
            optimizer.step()
            seen.append(optimizer.state[p]["exp_avg_sq"].item())
        return seen

    assert second(FedYogi) == pytest.approx([25 + 1e-6, 24.75 + 1e-6, 24.75 + 1e-6, 49.75 + 1e-6], rel=1e-12)
    assert second(FedAdam) == pytest.approx([25, 19, 14.25, 35.6875], rel=1e-6)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_the_second_moment_stays_positive(kind: Any) -> None:
    (p,) = parameters((1000,))
    optimizer = kind([p], lr=0.1, beta2=0.0 if kind is FedAdam else 0.3)
    steps(optimizer, range(50))
    assert (optimizer.state[p]["exp_avg_sq"] > 0).all()
    assert p.isfinite().all()


def test_slowmo_follows_the_workers_learning_rate() -> None:
    """The buffer is in units of a gradient: a change of gamma does not change what is remembered."""
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = SlowMo([p], lr=0.9, momentum=0.6)
    gammas, moved, way = [0.5, 0.1, 0.1, 2.0, 0.01], [1.0, -0.2, 0.3, 0.0, 0.01], []
    for gamma, change in zip(gammas, moved, strict=True):
        optimizer.param_groups[0]["inner_lr"] = gamma
        p.grad = torch.tensor([change], dtype=torch.float64)
        optimizer.step()
        way.append(p.item())
    assert way == pytest.approx(list(slowmo(2.0, moved, gammas, 0.9, 0.6)), rel=1e-12)


def test_slowmo_stands_still_while_the_workers_learning_rate_is_zero() -> None:
    """A warm-up begins with 0, and nobody has moved then: 0 / 0 must not reach the weights."""
    plain, warm = parameters((5,))[0], parameters((5,))[0]
    late = SlowMo([warm], inner_lr=0.0)
    warm.grad = torch.zeros(5)
    late.step()
    assert torch.equal(warm, plain)
    assert not late.state
    late.param_groups[0]["inner_lr"] = 0.5
    steps(SlowMo([plain], inner_lr=0.5), range(2))
    steps(late, range(1))
    late.param_groups[0]["inner_lr"] = 0.0
    warm.grad = torch.zeros(5)
    late.step()
    late.param_groups[0]["inner_lr"] = 0.5
    steps(late, range(1, 2))
    assert torch.equal(warm, plain)


@pytest.mark.parametrize("gamma", [1.0, 0.1, 3e-4])
def test_slowmo_without_momentum_is_plain_averaging(gamma: float) -> None:
    (p,) = parameters((1000,))
    optimizer = SlowMo([p], lr=1, momentum=0, inner_lr=gamma)
    for number in range(3):
        workers = [p.detach() - changes(p, 10 * number + i) for i in range(4)]
        mean = torch.stack(workers).mean(0)
        before = p.detach().clone()
        p.grad = before - mean
        optimizer.step()
        torch.testing.assert_close(p.detach(), mean, rtol=1e-6, atol=1e-6 * float(before.abs().max()))
        if gamma == 1:
            assert torch.equal(p, before - p.grad)


@pytest.mark.parametrize(("gamma", "bits"), [(1.0, True), (0.25, True), (0.1, False), (3e-4, False)])
def test_slowmo_at_one_learning_rate_is_sgd_with_momentum(gamma: float, bits: bool) -> None:
    (ours,), (plain,) = parameters((1000,), dtype=torch.float64), parameters((1000,), dtype=torch.float64)
    steps(SlowMo([ours], lr=0.5, momentum=0.8, inner_lr=gamma), range(8))
    steps(SGD([plain], lr=0.5, momentum=0.8), range(8))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    if bits:  # dividing by a power of two is exact
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_fedavgm_is_torch_s_sgd(beta: float) -> None:
    """v <- beta v + D; w <- w - v: so there is no class for it."""
    (p,), v = parameters((100,)), torch.zeros(100)
    w = p.detach().clone()
    optimizer = SGD([p], lr=1, momentum=beta)
    for number in range(4):
        p.grad = changes(p, number)
        optimizer.step()
        v = beta * v + p.grad
        w = w - v
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cut", [1, 3, 8, 50, 99])
@pytest.mark.parametrize("name", MAKE)
def test_a_step_on_slices_has_the_bits_of_a_step_on_the_whole(name: str, cut: int, dtype: torch.dtype) -> None:
    (whole,) = parameters((100,), dtype=dtype)
    storage = whole.detach().clone()
    parts = [nn.Parameter(storage[:cut]), nn.Parameter(storage[cut:])]  # views: the second begins anywhere in memory
    optimizer, split = MAKE[name]([whole]), MAKE[name](parts)
    for number in range(6):
        whole.grad = changes(whole, number)
        parts[0].grad, parts[1].grad = whole.grad[:cut], whole.grad[cut:]
        optimizer.step()
        split.step()
    assert torch.equal(whole, storage)
    for key, value in optimizer.state[whole].items():
        assert torch.equal(value, torch.cat([split.state[part][key] for part in parts])), key


@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_without_a_gradient_is_passed_over(name: str) -> None:
    first, second = parameters((3,), (3,))
    before, optimizer = second.detach().clone(), MAKE[name]([first, second])
    first.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(second, before)
    assert list(optimizer.state) == [first]


@pytest.mark.parametrize("name", MAKE)
def test_a_step_leaves_the_gradient_and_takes_groups_a_closure_and_a_tensor_for_lr(name: str) -> None:
    (first, second), (plain,) = parameters((2, 3), (4,)), parameters((2, 3))
    optimizer = MAKE[name]([{"params": [first], "lr": torch.tensor(0.25)}, {"params": [second], "lr": 0.0}])
    before = second.detach().clone()

    def closure() -> float:
        loss = (first**2).sum() + (second**3).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(((plain**2).sum() + (before**3).sum()).item())
    assert torch.equal(second, before)
    other = MAKE[name]([plain])
    other.param_groups[0]["lr"] = 0.25
    plain.grad = first.grad.clone()  # type: ignore[union-attr]
    other.step()
    assert torch.equal(first, plain)
    assert torch.equal(plain.grad, first.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_goes_on_with_the_same_bits_after_a_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, cut = parameters((7, 5), (), (0, 3), dtype=dtype), parameters((7, 5), (), (0, 3), dtype=dtype)
    uninterrupted, first = MAKE[name](whole), MAKE[name](cut)
    schedule = lambda o, n: [g.update(lr=0.1 / (n + 1)) for g in o.param_groups]  # noqa: E731
    for n in range(6):
        schedule(uninterrupted, n)
        steps(uninterrupted, range(n, n + 1))
    for n in range(3):
        schedule(first, n)
        steps(first, range(n, n + 1))
    again = [nn.Parameter(p.detach().clone()) for p in cut]
    second = MAKE[name](again)
    kind = type(first).__name__
    tree = snapshot.take_optimizer(first, kind, {p: f"p{i}" for i, p in enumerate(cut)})
    saved = checkpoint.load(checkpoint.save(tmp_path, 1, tree))
    snapshot.put_optimizer(saved, second, kind, {p: f"p{i}" for i, p in enumerate(again)})
    assert [{k: v for k, v in g.items() if k != "params"} for g in second.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in first.param_groups
    ]
    for n in range(3, 6):
        schedule(second, n)
        steps(second, range(n, n + 1))
    for ours, plain in zip(again, whole, strict=True):
        assert torch.equal(ours, plain)
        kept, expected = second.state[ours], uninterrupted.state[plain]
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[key], expected[key]) and kept[key].dtype == dtype for key in kept)


def test_the_fedopt_family_is_not_mixed_up_in_a_checkpoint() -> None:
    (p,) = parameters((2,))
    tree = snapshot.take_optimizer(FedAdam([p], 1), "FedAdam", {p: "p"})
    with pytest.raises(snapshot.SnapshotError, match="has optimizer FedAdam, this run FedYogi"):
        snapshot.put_optimizer(tree, FedYogi([p], 1), "FedYogi", {p: "p"})


@pytest.mark.parametrize(("make", "words"), [
    (lambda p: FedAdam(p, lr=-1), "lr: given -1, allowed: a number 0 or more"),
    (lambda p: FedAdagrad(p, lr=math.nan), "lr: given nan"),
    (lambda p: FedYogi(p, lr=1, momentum=1), "momentum: given 1, allowed: a number from 0 to less than 1"),
    (lambda p: FedYogi(p, lr=1, beta2=1), "beta2: given 1,"),
    (lambda p: FedAdagrad(p, lr=1, tau=0), "tau: given 0, allowed: a number above 0"),
    (lambda p: SlowMo(p, lr=-1), "lr: given -1"),
    (lambda p: SlowMo(p, momentum=-0.1), "momentum: given -0.1"),
    (lambda p: SlowMo(p, inner_lr=math.inf), "inner_lr: given inf"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(parameters((1,)))
