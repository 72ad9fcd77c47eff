"""Late contributions: what each policy makes of them, and delay compensation against its formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpips import checkpoint
from mpips.algorithms.staleness import POLICIES, Compensation, compensation
from mpips.config import Staleness, allowed, fields

LATE = [0, 1, 2, 4, 5, 9]
SETTINGS = st.builds(Staleness, bound=st.integers(0, 100), power=st.floats(0, 10))


@pytest.mark.parametrize(("policy", "power", "weights"), [
    ("none", 0.5, [1, 1, 1, 1, 1, 1]),
    ("dc", 0.5, [1, 1, 1, 1, 1, 1]),
    ("dc-adaptive", 0.5, [1, 1, 1, 1, 1, 1]),
    ("reject", 0.5, [1, 1, 1, 1, 0, 0]),
    ("inverse", 0.5, [1, 1, 1 / 2, 1 / 4, 1 / 5, 1 / 9]),
    ("poly", 0.5, [1, 1 / math.sqrt(2), 1 / math.sqrt(3), 1 / math.sqrt(5), 1 / math.sqrt(6), 1 / math.sqrt(10)]),  # fedbuff
    ("poly", 2, [1, 1 / 4, 1 / 9, 1 / 25, 1 / 36, 1 / 100]),
    ("poly", 0, [1, 1, 1, 1, 1, 1]),
    ("hinge", 0.5, [1, 1, 1, 1, 1 / 1.5, 1 / 3.5]),
    ("hinge", 10, [1, 1, 1, 1, 1 / 11, 1 / 51]),
])  # fmt: skip
def test_weights_worked_out_by_hand(policy: str, power: float, weights: list[float]) -> None:
    settings = Staleness(bound=4, power=power)
    assert [POLICIES[policy](late, settings) for late in LATE] == pytest.approx(weights, rel=1e-15)


def test_every_policy_of_the_configuration_has_a_row() -> None:
    assert allowed(fields()["staleness.policy"][0]).removesuffix(" or null").split(", ") == list(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
@given(settings=SETTINGS, late=st.integers(0, 10**6), later=st.integers(0, 10**6))
def test_a_weight_is_a_share_that_never_grows_with_lateness(policy: str, settings: Staleness, late: int, later: int) -> None:
    late, later = sorted((late, later))
    first, second = POLICIES[policy](late, settings), POLICIES[policy](later, settings)
    assert 1 >= first >= second >= 0
    assert (second > 0) == (policy != "reject" or later <= settings.bound)
    assert POLICIES[policy](0, settings) == 1
    assert isinstance(first, float)


def tensors(number: int, count: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(101, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def test_the_fixed_compensation_is_the_paper_s() -> None:
    """Two ranks, three steps, in numbers: g + lambda g^2 (w - w_k)."""
    own, w = Compensation(False, 0.5), torch.tensor([1.0, 2.0], dtype=torch.float64)
    own.remember(1, w)
    w -= torch.tensor([0.5, -1.0], dtype=torch.float64)  # 0.5, 3
    own.remember(2, w)
    w -= torch.tensor([0.5, 1.0], dtype=torch.float64)  # 0, 2
    for rank, given_, expected in [
        (1, [2.0, 3.0], [2 + 0.5 * 4 * (0 - 1), 3.0]),
        (2, [2.0, 3.0], [2 + 0.5 * 4 * (0 - 0.5), 3 + 0.5 * 9 * (2 - 3)]),
        (2, [-2.0, 0.0], [-2 + 0.5 * 4 * (0 - 0.5), 0.0]),  # the square has no sign
    ]:
        gradient = torch.tensor(given_, dtype=torch.float64)
        own.correct(rank, gradient, w)
        assert gradient.tolist() == pytest.approx(expected, rel=1e-15)


def test_the_adaptive_compensation_is_the_paper_s() -> None:
    """One mean square for all ranks, for each coordinate, with the present gradient in it."""
    own, w = Compensation(True, 2.0), torch.tensor([1.0, -3.0], dtype=torch.float64)
    own.remember(0, w)
    own.remember(1, w)
    w += torch.tensor([0.25, 0.5], dtype=torch.float64)
    squares = [0.0, 0.0]
    for rank, given_ in [(0, [2.0, 0.1]), (1, [-1.0, 0.0]), (0, [0.5, -30.0])]:
        squares = [0.95 * s + 0.05 * g * g for s, g in zip(squares, given_, strict=True)]
        moved = zip(given_, squares, (0.25, 0.5), strict=True)
        expected = [g + 2.0 / math.sqrt(s + 1e-7) * g * g * d for g, s, d in moved]
        gradient = torch.tensor(given_, dtype=torch.float64)
        own.correct(rank, gradient, w)
        assert gradient.tolist() == pytest.approx(expected, rel=1e-12)
    assert own.state_dict()["mean_square"].tolist() == pytest.approx(squares, rel=1e-12)


AWKWARD = [0.0, -0.0, 1e-45, -1e-45, 1e-30, 3e38, -3e38, 1e20]  # zeros, subnormal numbers, squares that are infinite


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("identity", ["tau=0", "lambda=0"])
def test_nothing_late_or_no_strength_leaves_every_bit(
    identity: str, adaptive: bool, dtype: torch.dtype, wire: torch.dtype
) -> None:
    """tau = 0 is SGD and lambda = 0 is plain asynchronous SGD, exactly."""
    own = Compensation(adaptive, 0.0 if identity == "lambda=0" else 2.0)
    (w,) = tensors(0, dtype=wire)
    for number in range(1, 4):
        own.remember(1, w)
        if identity == "lambda=0":
            w += 1
        (gradient,) = tensors(number, dtype=dtype)
        gradient[: len(AWKWARD)] = torch.tensor(AWKWARD, dtype=dtype)
        before = gradient.clone()
        own.correct(1, gradient, w)
        assert same_bits(gradient, before)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_coordinate_that_has_not_moved_keeps_its_bits(adaptive: bool) -> None:
    own, (w, gradient) = Compensation(adaptive, 2.0), tensors(0, 2)
    own.remember(1, w)
    w[50:] += 1
    before = gradient.clone()
    own.correct(1, gradient, w)
    assert same_bits(gradient[:50], before[:50])
    assert not (gradient[50:] == before[50:]).any()


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_the_distance_of_16_bit_weights_is_not_rounded_to_16_bits(wire: torch.dtype) -> None:
    own = Compensation(False, 1.0)
    w = torch.tensor([256.0], dtype=wire)
    own.remember(1, w)
    w[:] = -1.0078125
    gradient = torch.tensor([1.0])
    own.correct(1, gradient, w)
    assert gradient.item() == 1 - 257.0078125


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("cut", [1, 8, 50, 99])
def test_slices_are_corrected_as_the_whole_is(cut: int, adaptive: bool) -> None:
    whole, parts = Compensation(adaptive, 0.04), [Compensation(adaptive, 0.04) for _ in range(2)]
    (w,) = tensors(0)
    spans = (slice(cut), slice(cut, None))
    for number in range(1, 4):
        whole.remember(1, w)
        move, gradient = tensors(number, 2)
        split = gradient.clone()
        for part, span in zip(parts, spans, strict=True):
            part.remember(1, w[span])
            part.correct(1, split[span], w[span] + move[span])
        w += move
        whole.correct(1, gradient, w)
        assert same_bits(gradient, split)


def test_weights_are_copied_into_one_buffer_per_rank() -> None:
    own, (w,) = Compensation(False, 1.0), tensors(0, dtype=torch.bfloat16)
    own.remember(1, w)
    own.remember(2, w)
    buffers = own._sent
    addresses = {rank: kept.data_ptr() for rank, kept in buffers.items()}
    first = w.clone()
    w += 1
    assert torch.equal(buffers[1], first)
    own.remember(1, w)
    assert torch.equal(buffers[1], w)
    assert torch.equal(buffers[2], first)
    assert {rank: kept.data_ptr() for rank, kept in own._sent.items()} == addresses
    assert len({*addresses.values(), w.data_ptr()}) == 3
    assert {kept.dtype for kept in buffers.values()} == {torch.bfloat16}


def test_the_weights_are_not_changed() -> None:
    own, (w, gradient) = Compensation(True, 1.0), tensors(0, 2)
    own.remember(1, torch.zeros_like(w))
    before = w.clone()
    own.correct(1, gradient, w)
    assert torch.equal(w, before)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("done", [0, 3])
def test_it_goes_on_with_the_same_bits_after_a_checkpoint(done: int, adaptive: bool, wire: torch.dtype, tmp_path: Path) -> None:
    def go_on(own: Compensation, w: Tensor, numbers: range) -> list[Tensor]:
        corrected = []
        for number in numbers:
            move, gradient = tensors(number, 2)
            w += move.to(wire)
            own.correct(number % 3, gradient, w)
            own.remember(number % 3, w)
            corrected.append(gradient)
        return corrected

    own, (w,) = Compensation(adaptive, 0.5, decay=0.9), tensors(0, dtype=wire)
    for rank in range(3):
        own.remember(rank, w)
    go_on(own, w, range(done))
    tree = checkpoint.load(checkpoint.save(tmp_path, 1, {"staleness": own.state_dict()}))["staleness"]
    again, saved = Compensation(adaptive, 0.5, decay=0.9), w.clone()
    again.remember(7, w)
    again.load_state_dict(tree)
    assert not again._sent
    for rank in range(3):  # the weights are sent anew
        own.remember(rank, w)
        again.remember(rank, w)
    expected = go_on(own, w, range(done, 9))
    assert all(map(same_bits, go_on(again, saved, range(done, 9)), expected))


def test_a_fresh_one_has_a_tree_that_can_be_stored(tmp_path: Path) -> None:
    tree = checkpoint.load(checkpoint.save(tmp_path, 1, {"staleness": Compensation(True, 1.0).state_dict()}))["staleness"]
    again = Compensation(True, 1.0)
    again.correct(*_late(again))
    again.load_state_dict(tree)
    assert again.state_dict() == {}
    assert not again._sent


def _late(own: Compensation) -> tuple[int, Tensor, Tensor]:
    w, gradient = tensors(0, 2)
    own.remember(1, w)
    return 1, gradient, w


def test_what_is_put_back_is_copied() -> None:
    own, again = Compensation(True, 1.0), Compensation(True, 1.0)
    own.correct(*_late(own))
    again.load_state_dict(own.state_dict())
    before = again.state_dict()["mean_square"].clone()
    own.correct(1, *tensors(1, 2))
    assert torch.equal(again.state_dict()["mean_square"], before)


def test_the_policies_that_compensate() -> None:
    assert [name for name in POLICIES if compensation(name, Staleness())] == ["dc", "dc-adaptive"]
    for name, adaptive in (("dc", False), ("dc-adaptive", True)):
        own = compensation(name, Staleness(strength=0.25))
        assert own is not None
        assert (own.adaptive, own.strength, own.decay) == (adaptive, 0.25, 0.95)


@pytest.mark.parametrize(("policy", "strength"), [("dc", 0.04), ("dc-adaptive", 2.0)])
def test_each_compensation_has_the_strength_of_the_paper_s_experiments(policy: str, strength: float) -> None:
    for given_, expected in ((None, strength), (0.0, 0.0), (0.5, 0.5)):
        own = compensation(policy, Staleness(strength=given_))
        assert own is not None
        assert own.strength == expected
