"""Deterministic mode: one set of bits, whatever the MPI library, its algorithms or the placement."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_under_mpi import MPICH

SCRIPT = ROOT / "tests" / "helpers" / "resumable.py"
ALGORITHMS = [{}, {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1", "OMPI_MCA_coll_tuned_reduce_algorithm": "2"}]


def weights(done: subprocess.CompletedProcess[str]) -> str:
    (found,) = re.findall(r"weights (\w{64})", done.stdout)
    return found


@pytest.mark.parametrize("workers", [2, 4])
def test_the_same_weights_from_open_mpi_and_mpich(workers: int, mpirun: Any) -> None:
    if not MPICH.exists():
        pytest.skip(f"no second environment with MPICH at {MPICH}; `make test` makes it")
    flags = ["--deterministic", "--epochs", "2", "--samples", "501"]
    ours = mpirun(workers + 1, SCRIPT, *flags, "--run_dir", "openmpi")
    theirs = mpirun(workers + 1, SCRIPT, *flags, "--run_dir", "mpich", python=str(MPICH))
    assert "Open MPI" in ours.stdout
    assert "MPICH" in theirs.stdout, theirs.stdout + theirs.stderr
    assert weights(ours) == weights(theirs)


def test_the_same_weights_from_any_algorithm_and_bucket(mpirun: Any) -> None:
    flags = ["--deterministic", "--epochs", "1", "--samples", "501"]
    results = {
        weights(mpirun(4, SCRIPT, *flags, "--run_dir", f"run-{bucket}", "--bucket_cap_mb", bucket, environment=algorithm))
        for bucket, algorithm in zip(("16", "0.002"), ALGORITHMS, strict=True)
    }
    assert len(results) == 1
