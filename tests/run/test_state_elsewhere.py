"""The state of an optimizer that the server steps: a script that changes it on a worker is told."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World


def zero_momenta(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"].zero_()


def replace(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def restart(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {}


CHANGES: list[Callable[[Any], object]] = [zero_momenta, replace, restart, lambda optimizer: optimizer.state.clear()]


def stepped(
    e: Communicator,
    change: Callable[[Any], object],
    dtype: torch.dtype = torch.float64,
    stop: int = -1,
    several: bool = False,
    **settings: Any,
) -> Any:
    """Return the weights after two steps, a change of the optimizer's state, and another step; and the optimizer.

    The run is preempted after the round `stop`.
    """
    torch.manual_seed(1)
    model = nn.Linear(3, 1, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    given: Any = (model, optimizer)
    if several:
        other = nn.Linear(1, 1, dtype=dtype)
        given = [model, other], [optimizer, torch.optim.Adam(other.parameters())]
    ps = mpips.connect(*given, communicator=e, run_dir="run", **settings)
    for number in range(ps.round, 3):
        optimizer.zero_grad()
        model(torch.ones(2, 3, dtype=dtype)).sum().backward()
        if ps.round == stop - 1:
            ps.preempt()
        optimizer.step()
        if number == 1:
            change(optimizer)
    ps.close()
    return model.weight.detach().clone(), optimizer


def plain(change: Callable[[Any], object]) -> torch.Tensor:
    torch.manual_seed(1)
    model = nn.Linear(3, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        optimizer.step()
        if number == 1:
            change(optimizer)
    return model.weight.detach()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("size", "trains"), [(3, False), (2, True)])
def test_a_change_of_state_that_the_server_has_is_refused(size: int, trains: bool, change: Callable[[Any], object]) -> None:
    """It was lost, in silence: the momenta stayed."""
    with pytest.raises(RuntimeError, match=r"optimizer\.state after connect: the state is where the steps are taken"):
        World(size).run(lambda e: stepped(e, change, server_trains=trains))


@pytest.mark.parametrize("mode", ["sync", "local_sgd"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_state_counts_where_the_optimizer_has_it(change: Callable[[Any], object], mode: str) -> None:
    """A new `optimizer.state` was not taken notice of."""
    ((weights, _),) = World(1).run(lambda e: stepped(e, change, mode=mode))
    torch.testing.assert_close(weights, plain(change), atol=0, rtol=0)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_state_counts_in_a_resumed_run(change: Callable[[Any], object], several: bool) -> None:
    """After a resume the script's optimizer had a state of its own: changes were lost, in silence, and it was empty."""
    with pytest.raises(SystemExit, match="75"):
        World(1).run(lambda e: stepped(e, change, stop=1, several=several))
    ((weights, _),) = World(1).run(lambda e: stepped(e, change, resume="auto", several=several))
    torch.testing.assert_close(weights, plain(change), atol=0, rtol=0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_state_that_master_weights_have_is_refused(change: Callable[[Any], object]) -> None:
    with pytest.raises(RuntimeError, match=r"optimizer\.state after connect"):
        World(1).run(lambda e: stepped(e, change, dtype=torch.bfloat16))


def test_the_state_can_be_read_copied_and_taken_along() -> None:
    def read(optimizer: Any) -> None:
        assert [sorted(entries) for entries in optimizer.state_dict()["state"].values()] == [["momentum_buffer"]] * 2
        twin = copy.deepcopy(optimizer)
        twin.state.clear()
        twin.state[torch.zeros(1)]["new"] = 1

    found = World(3).run(lambda e: stepped(e, read))
    for weights, optimizer in found:
        torch.testing.assert_close(weights, plain(lambda _: None), atol=1e-13, rtol=0)
        assert type(optimizer) is torch.optim.SGD
        assert [sorted(entries) for entries in optimizer.state.values()] == [["momentum_buffer"]] * 2
        optimizer.state.clear()
