"""The contract in the simulated world; `promises/test_failure.py` has it end real jobs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from mpips.config import Config
from mpips.model.message import replicate
from mpips.server import contract
from tests.helpers.programs import cnn, mlp


def lines(model: nn.Module, **settings: object) -> list[str]:
    config = Config(**settings)  # type: ignore[arg-type]
    return contract.write(config, replicate(model, config, 2, World(1).ends[0].allocate))


def test_it_names_every_tensor_setting_and_version() -> None:
    model = cnn()
    model[1].requires_grad_(False)
    text = "\n".join(lines(model))
    for name in model.state_dict():
        assert re.search(rf"^(parameter|frozen|buffer) {re.escape(name)} = ", text, re.MULTILINE), name
    for key in Config().settings().keys() - {"run_dir", "resume", "chaos"}:
        assert f"setting {key} = " in text
    assert "version of torch = " in text


MISMATCHES: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "shape": (lambda rank: nn.Linear(12, 5 + (rank == 1)), "parameter weight = torch.float32 (5, 12)"),
    "order": (lambda rank: nn.ModuleDict({n: nn.Linear(4, 4) for n in ("ab" if rank == 1 else "ba")}), "parameter b.weight"),
    "frozen": (lambda rank: with_frozen(mlp(), rank != 1), "parameter 0.bias"),
    "buffer": (lambda rank: with_buffer(mlp(), 1 + (rank == 1)), "buffer scale = torch.float32 (1,)"),
}


def with_frozen(model: nn.Sequential, trained: bool) -> nn.Module:
    model[0].bias.requires_grad_(trained)
    return model


def with_buffer(model: nn.Module, size: int) -> nn.Module:
    model.register_buffer("scale", torch.ones(size))
    return model


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_names_rank_and_first_difference(what: str) -> None:
    make, line = MISMATCHES[what]

    def program(e: Communicator) -> None:
        mpips.connect(make(e.rank), lambda p: torch.optim.SGD(p, lr=1.0), run_dir="run", communicator=e)

    with pytest.raises(contract.ContractError, match=re.escape(f"rank 0 has `{line}") + ".*rank 1 has `"):
        World(3).run(program)


def test_all_ranks_raise_the_same_text_and_nothing_moves() -> None:
    texts: list[str] = []

    def program(e: Communicator) -> None:
        try:
            contract.agree(e, ["same", "x" if e.rank == 2 else "y"])
        except contract.ContractError as error:
            texts.append(str(error))
        assert not e.traffic["reduce calls"]

    World(4).run(program)
    assert len(texts) == 4
    assert set(texts) == {
        "the ranks do not agree: rank 0 has `y`, rank 2 has `x`; start every rank with the same script, settings and versions"
    }


@pytest.mark.parametrize(("theirs", "line"), [(["a"], "nothing more"), (["a", "b", "c"], "nothing more"), (["b", "a"], "`b`")])
def test_missing_further_and_swapped_lines_are_found(theirs: list[str], line: str) -> None:
    with pytest.raises(contract.ContractError, match=line):
        World(2).run(lambda e: contract.agree(e, ["a", "b"] if e.rank == 0 else theirs))


def test_agreement_is_the_digest_on_every_rank() -> None:
    digests = World(3).run(lambda e: contract.agree(e, lines(mlp())))
    assert len(set(digests)) == 1
    assert digests != World(3).run(lambda e: contract.agree(e, lines(mlp(), clip=1.0)))


def settled(*given: Config | str) -> list[str]:
    return World(len(given)).run(lambda e: contract.agree_on_settings(e, given[e.rank]))


def test_settings_that_all_have_are_settled() -> None:
    assert settled(*[Config(clip=1.0)] * 3) == [""] * 3
    assert settled(Config(run_dir="a"), Config(), Config(resume="b")) == [""] * 3, "only the server acts on these"


def test_a_setting_is_refused_on_all_ranks_in_one_line_whichever_have_it() -> None:
    assert settled(*["clip: given 'x', allowed: 1"] * 3) == ["clip: given 'x', allowed: 1"] * 3
    assert settled(Config(), Config(), "clip: given 'x', allowed: 1") == ["clip: given 'x', allowed: 1, on rank 2"] * 3
    assert settled("b", "a", "a", Config()) == ["b, on rank 0"] * 4


def test_settings_that_differ_are_named_with_their_ranks() -> None:
    line = "clip: given None on rank 0, 2.0 on ranks 1, 2, allowed: one value on all ranks"
    assert settled(Config(), Config(clip=2.0), Config(clip=2.0)) == [line] * 3
    many = settled(Config(), *[Config(seed=1)] * 6)
    assert many == ["seed: given 0 on rank 0, 1 on ranks 1, 2, 3, 4 and 2 more, allowed: one value on all ranks"] * 7
