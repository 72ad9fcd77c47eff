"""Codecs: what each entry of the table promises, and error feedback around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mpips
from mpips.comm import codecs
from mpips.comm.codecs import CODECS, BFloat16, Codec, ErrorFeedback, codec_of
from mpips.config import ConfigError
from mpips.config.names import check_codec, codec_names
from tests.comm.test_multi_node import MAKE, on_nodes, uneven
from tests.reduce.test_shared_memory_transport import Odd, assert_alike

each_codec = pytest.mark.parametrize("name", CODECS)
HOST = torch.device("cpu")


def random(numel: int = 1000) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


def through(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    encoded = torch.empty(len(values), dtype=codec.wire)
    codec.encode(values, encoded)
    assert encoded.nbytes == codec.bytes(len(values))
    return codec.decode(encoded, HOST)


@each_codec
def test_each_number_is_encoded_by_itself(name: str) -> None:
    codec, values = CODECS[name](torch.float32), random()
    whole = through(codec, values)
    parts = [through(codec, values[part]) for part in (slice(0, 7), slice(7, 500), slice(500, 1000))]
    assert torch.equal(whole, torch.cat(parts))


@each_codec
def test_an_exact_codec_gives_back_what_was_encoded_and_no_other_does(name: str) -> None:
    codec, values = CODECS[name](torch.float32), random()
    assert torch.equal(through(codec, values).float(), values) == codec.exact


@each_codec
def test_zero_stays_zero_and_what_is_not_finite_stays_so(name: str) -> None:
    odd = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")])
    assert torch.equal(through(CODECS[name](torch.float32), odd).float().nan_to_num(7.0), odd.nan_to_num(7.0))


@each_codec
def test_with_error_feedback_all_have_the_same_and_come_to_what_is_wanted(name: str) -> None:
    """The error of a step is part of the next one, so it does not add up."""
    feedback, want = ErrorFeedback(CODECS[name](torch.float32)), random()
    ours, theirs = torch.zeros(1000), torch.zeros(1000)
    for _ in range(20):
        want += 0.01 * random()
        encoded = torch.empty(1000, dtype=CODECS[name](torch.float32).wire)
        feedback.encode(want, ours, encoded)
        feedback.decode(encoded, theirs)
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, want, rtol=2**-8, atol=2**-8 * 0.05)


def test_double_precision_is_never_rounded() -> None:
    assert codec_of("bfloat16", torch.float64) == Codec(torch.float64)
    assert codec_of("bfloat16", torch.float32) == BFloat16(torch.float32)


def test_a_setting_names_an_entry_of_the_table() -> None:
    assert codec_names() == list(CODECS), "which is read without importing torch"
    with pytest.raises(ConfigError, match="comm_dtype: given 'int7', allowed: full, bfloat16"):
        check_codec("int7", codec_names())


class Float16(Codec):
    exact = False

    @property
    def wire(self) -> torch.dtype:
        return torch.float16


def test_one_more_entry_is_one_more_codec(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is all that a new codec takes; half precision keeps more bits of gradients of this size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(codecs.CODECS, "float16", Float16)
    monkeypatch.setattr("mpips.config.names.codec_names", lambda: list(codecs.CODECS))
    settings: dict[str, Any] = {"plan": "sharded", "rounds": 4}
    full, half, rounded = (
        uneven(on_nodes([2, 2]), Odd, MAKE["momentum"], comm_dtype=name, run_dir=name, **settings)
        for name in ("full", "float16", "bfloat16")
    )
    assert_alike(half, half[:1])
    near, far = ((sum((a - b).abs().sum() for a, b in zip(one[0], full[0], strict=True))) for one in (half, rounded))
    assert 0 < near < far
    assert mpips.Config().comm_dtype == "full"
