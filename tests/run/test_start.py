"""What a rank knows before MPI has started: its GPU, its number, and that the launcher and the MPI library fit."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mpips
from mpips.comm import mpi
from mpips.config import ConfigError
from mpips.process.environment import LAUNCHERS
from mpips.run import start
from tests.process.test_environment import LAUNCHED

ALONE = [launcher.name for launcher in LAUNCHERS if launcher.size]


class Library:
    """An MPI library that has found `size` ranks, of which this one is `rank`, and number `local` on its node."""

    COMM_TYPE_SHARED = 0

    def __init__(self, rank: int, size: int, local: int = 0) -> None:
        node = SimpleNamespace(rank=local, Free=lambda: None)
        self.COMM_WORLD = SimpleNamespace(rank=rank, size=size, Split_type=lambda kind: node)

    def Get_library_version(self) -> str:  # as Open MPI's, with a NUL at its end
        return "Open MPI v5.0.11, package: x\0"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start as a rank that has these variables, and has or has not an MPI library to ask."""

    def tell(text: str, library: Library | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        monkeypatch.setattr(os, "environ", kept | dict(pair.split("=") for pair in text.split()))

        def ask() -> Any:
            assert library, "MPI is initialised before it has to be"
            return library

        monkeypatch.setattr(mpi, "_library", ask)

    return tell


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that there are 4 GPUs; the list of those that were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    return current


@pytest.mark.parametrize("name", ALONE)
def test_each_rank_of_a_node_has_its_own_gpu_under_every_launcher(name: str, told: Any, gpus: list[int]) -> None:
    told(LAUNCHED[name])
    assert mpips.device() == torch.device("cuda", 1)
    assert gpus == [1]


def test_mpi_says_which_gpu_where_the_launcher_does_not(told: Any, gpus: list[int]) -> None:
    told(LAUNCHED["PMIx"], Library(rank=5, size=6, local=3))
    assert mpips.device() == torch.device("cuda", 3)
    assert (mpips.workers(), mpips.worker_index()) == (5, 4)


def test_one_process_asks_nobody(told: Any, gpus: list[int]) -> None:
    told("")
    assert mpips.device() == torch.device("cuda", 0)
    assert (mpips.workers(), mpips.worker_index()) == (1, 0)


@pytest.mark.parametrize("name", ALONE)
def test_ranks_that_were_started_together_and_are_each_alone_are_refused_under_every_launcher(
    name: str, told: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = next(launcher for launcher in LAUNCHERS if launcher.name == name)
    told(LAUNCHED[name].replace("=5", "=0"))
    alone = Library(rank=0, size=1)
    monkeypatch.setattr(mpi, "_library", lambda: mpi._fitting(alone))
    with pytest.raises(SystemExit) as end:
        start.join(start.configure())
    assert end.value.code == 2
    said = f"mpips: 6 ranks were started, but each is alone: the launcher ({name}) and this MPI (Open MPI v5.0.11, package: x) "
    assert capsys.readouterr().err == said + f"do not fit. Start with {own.fix}\n"


def test_where_nobody_gives_the_number_of_ranks_the_second_says_that_each_is_alone(
    told: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in ((0, 0), (1, 1), (5, 0)):
        told(LAUNCHED["PMIx"].replace("=5", f"={rank}"))
        monkeypatch.setattr(mpi, "_library", lambda: mpi._fitting(Library(rank=0, size=1)))
        if rank:
            with pytest.raises(SystemExit) as end:
                start.join(start.configure())
            assert end.value.code == 2
        else:
            assert mpi.launched() == 1
        assert capsys.readouterr().err.count("several ranks were started, but each is alone") == said


def test_a_job_of_one_rank_is_no_mistake(told: Any) -> None:
    told("FLUX_TASK_RANK=0 FLUX_JOB_SIZE=1 FLUX_TASK_LOCAL_ID=0 PMI_RANK=0 PMI_SIZE=1")
    assert start.join(start.configure()).size == 1


def test_a_refused_process_does_not_look_through_all_objects_of_torch_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start.process, "ends_with", lambda status: None)
    gc.unfreeze()
    ending = start.refused(ConfigError("clip: given -1, allowed: a number above 0"))
    assert isinstance(ending, SystemExit)
    assert gc.get_freeze_count() > 1000  # and stays so, as `conftest` has it
    assert capfd.readouterr().err == "mpips: clip: given -1, allowed: a number above 0\n"


@pytest.mark.parametrize(
    ("settings", "tolerant", "allowed"),
    [
        ({"min_workers": 2}, True, ""),
        ({"min_workers": 0}, False, ""),
        ({"min_workers": 4}, True, "given 4 with 3 workers, allowed: 3 at most"),
        ({"min_workers": 2}, False, "given 2, allowed: 0 under this mpiexec"),
        ({"min_workers": 2, "mode": "fedavg"}, True, ""),
        ({"min_workers": 2, "mode": "fedavg", "rule": "median"}, True, "rule median, which combines clients"),
        ({"min_workers": 2, "mode": "scaffold"}, True, "given 2 with mode scaffold, allowed: 0"),
        ({"min_workers": 2, "plan": "sharded"}, True, "given 2 with plan sharded, allowed: plan auto or root"),
        ({"min_workers": 2, "overlap": True, "mode": "async"}, True, "given 2 with overlap, allowed: one of them"),
        ({"min_workers": 1, "rule": "krum"}, True, "krum with robust.num_byzantine=1 needs 5 contributions, 2 came"),
    ],
)
def test_whether_a_run_can_go_on_without_workers_is_said_at_connect(
    settings: dict[str, Any], tolerant: bool, allowed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", str(int(tolerant)))
    config = mpips.Config(**settings)
    if allowed:
        with pytest.raises((SystemExit, ConfigError)) as refused:
            start.check_min_workers(config, 3)
        assert allowed in capfd.readouterr().err + str(refused.value)
    else:
        start.check_min_workers(config, 3)
    start.check_min_workers(config, 1)  # the script in one process
