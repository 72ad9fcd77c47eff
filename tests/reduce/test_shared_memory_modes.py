"""Modes with local steps, and models of 16 bits, in shared memory: weights and checkpoints are those of a run by messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, optim

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.programs import OPTIMIZERS, cnn, data, mlp, sha, train
from tests.promises.test_resume import assert_same
from tests.reduce import test_shared_memory_transport
from tests.reduce.test_shared_memory_transport import ELEMENTWISE, WORLDS, assert_alike, is_shared, odd, sharing, tree_of

small_pieces = test_shared_memory_transport.small_pieces
PLANS = pytest.mark.parametrize("chosen", ["root", "sharded"])
LOCAL: dict[str, dict[str, Any]] = {
    "local_sgd": {"local": {"steps": 2}},
    "local_sgd clip": {"mode": "local_sgd", "local": {"steps": 2}, "clip": 0.05},
    "local_sgd after": {"mode": "local_sgd", "local": {"steps": 3, "after": 1}},
    "local_sgd momentum": {"mode": "local_sgd", "local": {"steps": 2}, "outer": {"momentum": 0.5}},
    "slowmo": {"local": {"steps": 2}},
    "diloco": {"local": {"steps": 2}},
    "streaming": {"mode": "diloco", "local": {"steps": 4, "fragments": 2, "delay": 1, "mix": 0.5}},
    "streaming whole": {"mode": "diloco", "local": {"steps": 2, "delay": 1}},
    "fedavg": {"clip": 0.1},
    "fedprox": {"clients": {"mu": 0.1}},
    "fednova": {},
    "qfedavg": {"clients": {"q": 1.0}},
    "scaffold": {},
    "fedavgm": {},
    "fedadam": {},
    "normclip": {"mode": "diloco", "local": {"steps": 2}, "rule": "normclip", "robust": {"clip_radius": 0.01}},
}


@PLANS
@pytest.mark.parametrize("trains", [False, True], ids=["dedicated", "rank 0 trains"])
@pytest.mark.parametrize("name", LOCAL)
def test_modes_with_local_steps_have_the_bits_of_a_run_by_messages(name: str, trains: bool, chosen: str) -> None:
    settings = {"mode": name, "deterministic": True, "server_trains": trains, **LOCAL[name]}
    make = ELEMENTWISE["momentum"]
    if settings["mode"] in ("scaffold", "qfedavg"):  # one rate for all
        make = lambda model: optim.SGD(model.parameters(), lr=0.05)  # noqa: E731
    expected, tree = odd(World(3), make, torch.float32, (False, False), rounds=7, **settings)
    ours, own = odd(
        sharing(3, len(name)),
        make,
        torch.float32,
        (True, chosen == "sharded"),
        rounds=7,
        plan=chosen,
        run_dir=chosen,
        **settings,
    )
    assert_alike(ours, expected)
    assert_same(own, tree)


@pytest.mark.parametrize("nodes", [[4], [2, 2]], ids=str)
@PLANS
def test_what_is_dropped_leaves_no_trace_in_the_statistics(nodes: list[int], chosen: str) -> None:
    """Of a worker whose gradients are infinite, BatchNorm's statistics would do no harm but that they are its own alone."""

    def program(e: Communicator, **settings: Any) -> list[Tensor]:
        net = cnn()
        made = optim.SGD(net.parameters(), lr=0.05)
        given = {"mode": "local_sgd", "local": {"steps": 2}, "nonfinite": "drop", **settings}
        ps = mpips.connect(net, made, communicator=e, **given)
        for number, (x, y) in enumerate(ps.batches(data(160), 5, shuffle=False)):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            if e.rank == 3 and number == 2:
                next(net.parameters()).grad[0] = math.inf
            ps.step(loss.detach())
        assert is_shared(ps) == ("plan" in settings)
        return [b.clone() for b in net.buffers()]

    expected = World(4).run(lambda e: program(e, run_dir="mpi"))
    ours = World(4, shares=True, nodes=nodes).run(lambda e: program(e, run_dir="shared", plan=chosen))
    for mine, theirs in zip(ours, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


SIXTEEN = [
    ("momentum", torch.bfloat16, {}),
    ("adam", torch.bfloat16, {"clip": 0.05, "server_trains": True}),
    ("adam fused", torch.float16, {}),
    ("momentum", torch.bfloat16, {"mode": "local_sgd", "local": {"steps": 2}}),
    ("momentum", torch.bfloat16, {"mode": "diloco", "local": {"steps": 2}, "server_trains": True}),
    ("momentum", torch.bfloat16, {"mode": "fedavg"}),
]


@PLANS
@pytest.mark.parametrize(("name", "dtype", "settings"), SIXTEEN)
def test_models_of_16_bits_have_the_bits_of_a_run_by_messages(
    name: str, dtype: torch.dtype, settings: dict[str, Any], chosen: str
) -> None:
    given = {"deterministic": True, **settings}
    expected, tree = odd(World(3), ELEMENTWISE[name], dtype, (False, False), **given)
    assert all(tensor.isfinite().all() for tensor in expected[0])
    shared = (True, chosen == "sharded")
    ours, own = odd(sharing(3, 1), ELEMENTWISE[name], dtype, shared, plan=chosen, run_dir=chosen, **given)
    assert_alike(ours, expected)
    assert_same(own, tree)
    assert tree["masters"].keys() == tree["parameters"].keys() - {"again.weight"}


@pytest.mark.parametrize(
    ("before", "after"), [("mpi", "sharded"), ("sharded", "mpi"), ("sharded", "root"), ("root", "sharded")]
)
def test_a_model_of_16_bits_resumes_under_another_plan(before: str, after: str) -> None:
    """With its masters: what rounding to 16 bits has left over is not lost."""

    def run(kind: str, epochs: int, **settings: Any) -> list[str]:
        world, own = WORLDS[kind]()

        def program(communicator: Communicator) -> str:
            net = mlp().bfloat16()
            given = data(47, torch.bfloat16)
            train(
                communicator, net, OPTIMIZERS["adam"](net.parameters()), given, 5, epochs, deterministic=True, **own, **settings
            )
            return sha(net.float())

        return world.run(program)

    expected = run("mpi", 3, run_dir="whole")
    run(before, 1, run_dir="cut")
    assert run(after, 3, run_dir="cut", resume="auto") == expected
    one, other = tree_of("whole"), tree_of("cut")
    assert_same(other["masters"], one["masters"])
    assert any((m != m.bfloat16()).any() for m in one["masters"].values()), "there is something to lose"
