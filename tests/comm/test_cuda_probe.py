"""Whether an MPI takes device memory is found out in a child process, which may crash."""

from __future__ import annotations

import os

import pytest
import torch

from mpips.comm import Communicator
from mpips.comm import cuda_probe as proof
from mpips.comm.simulated import World
from mpips.config import Config
from mpips.run import start


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "a test transfer ended with SIGSEGV"),
        (
            "import sys; sys.exit('what arrived is not what was sent')",
            "a test transfer failed: what arrived is not what was sent",
        ),
        ("import sys; sys.exit(3)", "a test transfer failed: status 3"),
        ("import time; time.sleep(60)", "a test transfer did not end within 1 s"),
        ("import sys; sys.exit(sys.argv[1])", "a test transfer failed: 5"),
    ],
    ids=["works", "crashes", "other content", "no message", "hangs", "device"],
)
def test_what_becomes_of_the_child_is_told(program: str, why: str) -> None:
    assert proof.failure(5, program, limit=1 if "sleep" in program else 60) == why


def test_the_child_is_no_rank_of_this_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    seen = "import os, sys; sys.exit(' '.join(n for n in sorted(os.environ) if n.startswith(('OMPI', 'PMI', 'SLURM'))))"
    expected = " ".join(sorted(n for n in os.environ if n.startswith("OMPI_") and not n.startswith("OMPI_COMM_WORLD")))
    assert "OMPI_MCA_pml" in expected
    assert proof.failure(0, seen) == f"a test transfer failed: {expected}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine without a GPU")
def test_the_transfer_itself_fails_without_a_gpu() -> None:
    assert "a test transfer failed: " in proof.failure(0)


def test_all_ranks_end_and_one_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ends = {0: "", 1: "it crashed", 2: "it hung", 3: ""}

    def program(communicator: Communicator) -> object:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: communicator.rank)
        monkeypatch.setattr(proof, "failure", ends.__getitem__)
        with pytest.raises(SystemExit) as end:
            start._prove(communicator)
        return end.value.code

    assert World(4).run(program) == [2] * 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mpips: cuda_aware: on rank 1 it crashed; expected an MPI that was built for CUDA.")


def test_nothing_is_tried_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(proof, "failure", lambda device: tried.append(device) or "")
    start.join(Config())
    assert tried == []
    start.join(Config(cuda_aware=True))
    assert tried == [0]
