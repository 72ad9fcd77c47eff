"""On a machine with a GPU: the promises about bits, staging, and streams. Skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mpips
from mpips.comm import SERVER, Communicator
from mpips.comm.simulated import World
from mpips.reduce.shared_memory_transport import SharedMemoryTransport
from tests.comm.test_mpi import as_simulated, on_mpi
from tests.helpers.programs import MODELS, OPTIMIZERS, data, in_order, sha

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(communicator: Communicator, model: str, optimizer: str) -> str:
    device = mpips.device()  # of several ranks each its own, if there are as many
    net = MODELS[model]().to(device)
    ps = mpips.connect(net, OPTIMIZERS[optimizer](net.parameters()), communicator=communicator, run_dir="run")
    for _ in ps.epochs(3):
        for x, y in ps.batches(data(), 16, shuffle=False):
            loss = F.cross_entropy(net(x.to(device)), y.to(device))
            loss.backward()
            ps.step(loss)
    return sha(net.cpu())


def plainly(model: str, optimizer: str) -> str:
    net = MODELS[model]().cuda()
    made = OPTIMIZERS[optimizer](net.parameters())
    for x, y in in_order(data(), 16, 3):
        made.zero_grad()
        F.cross_entropy(net(x.cuda()), y.cuda()).backward()
        made.step()
    return sha(net.cpu())


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("model", MODELS)
def test_one_process_on_a_gpu_is_plain_pytorch(model: str, optimizer: str) -> None:
    assert on_gpu(World(1).ends[0], model, optimizer) == plainly(model, optimizer)


@pytest.mark.mpi(min_size=2)
def test_one_worker_on_a_gpu_over_mpi_is_plain_pytorch() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 2:
        pytest.skip("one worker is 2 ranks")
    assert on_mpi(as_simulated(lambda e: on_gpu(e, "mlp", "adam"))) == [None, plainly("mlp", "adam")]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("needs", ["sum", "rows"])
def test_device_tensors_are_staged_piece_by_piece_after_slow_kernels(needs: Any) -> None:
    """The content is still being computed when the call is made: MPI must not read it early."""

    def program(e: Communicator) -> Any:
        message = torch.zeros(300_001, device="cuda")
        torch.cuda._sleep(200_000_000)
        message += e.rank + 1
        got: list[torch.Tensor] = []
        e.reduce(message, 300_000, needs, lambda part, rows: got.append(rows.sum(0).cpu()))
        back = torch.full((1000,), float(e.rank), device="cuda")
        torch.cuda._sleep(200_000_000)
        back *= 2
        e.broadcast(back)
        return torch.cat(got) if got else None, back.cpu()

    results = on_mpi(program)
    size = len(results)
    assert torch.equal(results[SERVER][0], torch.full((300_000,), size * (size + 1) / 2))
    assert all(torch.equal(back, torch.zeros(1000)) for _, back in results)


def slowly(communicator: Communicator, slow: bool, **settings: Any) -> tuple[str, bool]:
    """The weights after some rounds, and whether messages lay in memory that ranks map; backward may be far from done."""
    device = mpips.device()
    net = MODELS["mlp"]().to(device)
    if slow:
        for p in net.parameters():
            p.register_hook(lambda grad: torch.cuda._sleep(50_000_000) or grad)
    ps = mpips.connect(
        net, OPTIMIZERS["adam"](net.parameters()), communicator=communicator, deterministic=True, clip=0.1, **settings
    )
    for _ in ps.epochs(2):
        for x, y in ps.batches(data(), 8, shuffle=False):
            loss = F.cross_entropy(net(x.to(device)), y.to(device))
            loss.backward()
            ps.step(loss)
    return sha(net.cpu()), isinstance(ps._worker.server.transport, SharedMemoryTransport)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("plan", ["root", "sharded"])
def test_ranks_of_a_node_combine_and_step_in_each_others_device_memory(plan: str, slow: bool) -> None:
    _, *ours = on_mpi(as_simulated(lambda e: slowly(e, slow, plan=plan, run_dir="run")))
    _, *by_messages = on_mpi(as_simulated(lambda e: slowly(e, slow, shared_memory=False, run_dir="run")))
    assert [shared for _, shared in ours] == [True] * len(ours)
    assert [shared for _, shared in by_messages] == [False] * len(ours)
    assert {weights for weights, _ in ours} == {weights for weights, _ in by_messages}


@pytest.mark.mpi(min_size=2)
def test_a_large_message_is_staged_through_two_buffers() -> None:
    def program(e: Communicator) -> torch.Tensor:
        message = torch.arange(10_000_019, dtype=torch.float32, device="cuda") % 1000 * (e.rank + 1)
        e.broadcast(message)
        e.reduce(message, len(message), "sum", lambda part, rows: None)
        return message.cpu()

    results = on_mpi(program)
    assert torch.equal(results[SERVER], torch.arange(10_000_019, dtype=torch.float32) % 1000 * len(results))


def test_a_resumed_gpu_run_has_the_same_bits() -> None:
    def run(folder: str, epochs: int, **settings: Any) -> str:
        net = MODELS["mlp"]().cuda()
        ps = mpips.connect(net, OPTIMIZERS["adam"](net.parameters()), communicator=World(1).ends[0], run_dir=folder, **settings)
        for _ in ps.epochs(epochs):
            for x, y in ps.batches(data(), 16):
                loss = F.cross_entropy(F.dropout(net(x.cuda()), 0.1), y.cuda())
                loss.backward()
                ps.step(loss)
        return sha(net.cpu())

    torch.manual_seed(5)
    whole = run("whole", 4)
    torch.manual_seed(5)
    run("cut", 2)
    torch.manual_seed(6)
    assert run("cut", 4, resume="auto") == whole
