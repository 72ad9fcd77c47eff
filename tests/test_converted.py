"""The table of docs/howto/convert.md: every row has its test, here or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpips
from mpips.comm import Communicator
from mpips.comm.simulated import World
from tests.helpers.programs import data, mlp
from tests.test_documents import ROOT, table

ROWS = {  # how a row begins, and the test of it; of frameworks' own launches docs/conversions.md has a script
    "`optimizer.step()`": "test_every_bit_is_that_of_plain_pytorch",
    "the loss in `metrics.csv`": "test_metrics_are_samples_weighted_means_over_the_ranks",
    "a `DataLoader`": "test_a_sharded_loader_is_the_loader_but_for_its_batches",
    "a dataset": "test_data_with_a_batch_size_is_the_loader_that_a_script_would_write",
    "any iterable": "test_streamed_batches_count_their_samples",
    "`DistributedSampler`": "test_a_loader_that_divides_its_data_already_is_an_error",
    "`scheduler.step()`": "test_every_scheduler_goes_on_exactly_after_a_checkpoint",
    '`group["lr"]': "test_whatever_sets_the_rate_works_as_in_plain_pytorch",
    "`clip_grad_norm_`": "test_a_loop_is_that_of_one_process",
    "`GradScaler`": "test_a_loop_is_that_of_one_process",
    "`optimizer.step(closure)`": "test_a_loop_is_that_of_one_process",
    "LBFGS": "test_a_loop_is_that_of_one_process",
    "Prodigy": "test_weights_numbers_and_evaluations_are_those_of_one_process",
    "`SparseAdam`": "test_sparse_gradients_with_sparse_adam_are_plain_pytorch_s",
    "work by hand": "test_a_converted_line_is_that_of_one_process",
    "two models": "test_several_models_and_optimizers_in_one_run",
    "one training after another": "test_several_runs_one_after_another_in_one_script",
    "gradient accumulation": "test_gradient_accumulation_is_the_larger_batch",
    "`continue`": "test_a_batch_that_is_passed_over_does_not_count",
    "`break`": "test_a_break_ends_this_workers_shard_only",
    "freezing": "test_unfreezing_after_connect_is_an_error_and_not_silence",
    "`load_state_dict`": "test_a_state_that_a_server_elsewhere_would_not_have_is_refused",
    "momenta set to zero": "test_a_change_of_state_that_the_server_has_is_refused",
    "steps outside": "test_steps_outside_of_loops_and_epochs_go_on_by_the_round",
    "EMA": "test_what_the_script_keeps_is_in_the_file_and_given_back",
    "`zip(a, b)`": "test_a_converted_line_is_that_of_one_process",
    "several steps": "test_several_steps_on_one_batch",
    "frozen parts": "test_a_teacher_that_the_script_moves_is_saved_and_resumed",
    "`acc = test": "test_validate_measures_on_worker_0_in_eval_mode_and_tells_all",
    "`torch.save": "test_state_dict_is_whole_and_plain_pytorch_loads_it",
    "`test()`": "test_a_dedicated_server_executes_no_line_after_connect_but_atexit",
    "`print`": "test_the_worker_s_number_is_there_before_connect",
    "a loss that is a mean over tokens": "test_a_converted_line_is_that_of_one_process",
    "a batch drawn ahead": "test_samples_that_may_be_of_another_step_are_said",
    "MPI of its own": "test_mpi_of_the_script_s_own_without_the_server",
    "Horovod": "horovod examples/pytorch/pytorch_mnist.py",
    "`device =": "test_each_rank_of_a_node_has_its_own_gpu_under_every_launcher",
    "`parser.parse_args()`": "test_plain_flags_are_the_script_s_unless_it_says_otherwise",
    "`torch.manual_seed(0)`": "test_ranks_that_nobody_has_seeded_alike_are_told",
    "Hugging Face": "test_trainer_on_3_ranks_is_one_on_the_joined_batch",
    "accelerate": "test_accelerator_on_3_ranks_is_one_on_the_joined_batch",
    "Lightning": "test_lightning_on_3_ranks_is_one_on_the_joined_batch_and_resumes",
}


def test_every_row_of_the_table_has_a_test() -> None:
    rows = [row[0] for row in table(ROOT / "docs" / "howto" / "convert.md", "in your script")]
    assert [begin for row, begin in zip(rows, ROWS, strict=True) if not row.startswith(begin)] == []
    there = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", there, re.MULTILINE))
    scripts = (ROOT / "docs" / "conversions.md").read_text()
    assert [name for name in ROWS.values() if name not in defined and f"| {name} |" not in scripts] == []


D = torch.float64
SIZES = pytest.mark.parametrize("size", [1, 3, 5])  # ranks: 1, 2 and 4 workers
Part = Callable[[Tensor], Tensor]


def by_hand(model: nn.Module, optimizer: Any, ps: Any, part: Part) -> None:
    """Gradients cut to their signs, of all workers' mean."""
    for _ in range(4):
        x, y = map(part, data(64, D))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if ps:
            ps.average()
        for p in model.parameters():
            p.grad = p.grad.sign()
        optimizer.step()


def zipped(model: nn.Module, optimizer: Any, ps: Any, part: Part) -> None:
    """Two loaders, of which one process takes the joined pairs of batches."""
    x, y = data(64, D)
    pairs = [DataLoader(TensorDataset(t[:32], y[:32]), 8 if ps else 8 * int(part(torch.ones(1)))) for t in (x, -x)]
    for (a, target), (b, _) in ps.batches(zip(*pairs, strict=True)) if ps else zip(*pairs, strict=True):
        optimizer.zero_grad()
        (F.cross_entropy(model(a), target) + model(b).square().mean()).backward()
        optimizer.step()


def tokens(model: nn.Module, optimizer: Any, ps: Any, part: Part) -> None:
    """A mean over what is not masked, of which each worker has another number."""
    for _ in range(4):
        x, y = map(part, data(64, D))
        y = y.where(x[:, 0] > 0, -100)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, ignore_index=-100)
        loss.backward()
        if ps:
            ps.step(loss, samples=int((y != -100).sum()))
        else:
            optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@SIZES
@pytest.mark.parametrize("loop", [by_hand, zipped, tokens])
def test_a_converted_line_is_that_of_one_process(loop: Any, size: int) -> None:
    def program(e: Communicator) -> Tensor:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        loop(model, optimizer, ps, lambda t: t[ps.worker :: ps.workers])
        return weights(model)

    model, workers = mlp().to(D), max(1, size - 1)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None, lambda t: t * workers if len(t) == 1 else t)
    for ours in World(size).run(program):
        torch.testing.assert_close(ours, weights(model), atol=1e-13, rtol=0)


@SIZES
def test_a_batch_that_is_passed_over_does_not_count(size: int) -> None:
    """The last worker's first batch is bad: its next step joins the others' first."""
    x, y = data(64, D)
    workers = max(1, size - 1)
    joined = list(torch.arange(64).split(8 * workers))
    shares = [[rows[worker::workers] for rows in joined] for worker in range(workers)]  # of each loop's items every n-th
    x[shares[-1].pop(0)] = torch.nan

    def program(e: Communicator) -> Tensor:
        model = mlp().to(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ps = mpips.connect(model, optimizer, communicator=e, run_dir="run")
        for a, b in ps.shard(DataLoader(TensorDataset(x, y), 8)):
            if a.isnan().any():
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
        return weights(model)

    model = mlp().to(D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batches in zip_longest(*shares, fillvalue=torch.arange(0)):
        rows = torch.cat(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    for ours in World(size).run(program):
        torch.testing.assert_close(ours, weights(model), atol=1e-13, rtol=0)


OWN_MPI = """
import torch
from mpi4py import MPI
import mpips

comm = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank > 0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ps = mpips.connect(model, optimizer, run_dir="run")
for x in ps.batches(torch.ones(8, 2), 2):
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert comm.allreduce(1) == ps.workers
ps.print("all", comm.allgather(ps.worker)) if ps.worker == 0 else comm.allgather(ps.worker)
"""


def test_mpi_of_the_script_s_own_without_the_server(mpirun: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MPI)
    done = mpirun(3, "own.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all [0, 1]" in done.stdout
