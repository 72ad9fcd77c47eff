"""A probe of whether this MPI accepts device memory: a transfer in a child process, as MPI may crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PROGRAM = """
import sys, torch
from mpi4py import MPI
torch.cuda.set_device(int(sys.argv[1]))
given = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
taken, total = torch.zeros_like(given), given.clone()
torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(given, 0, recvbuf=taken, source=0)
MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, total)
torch.cuda.synchronize()
sys.exit(0 if torch.equal(taken, given) and torch.equal(total, given) else "what arrived is not what was sent")
"""
LAUNCHERS = (
    "OMPI_COMM_WORLD",
    "OMPI_MCA_ess",
    "OMPI_MCA_orte",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "MPI_LOCAL",
    "MV2_COMM_WORLD",
    "HYDRA_",
    "HYDI_",
    "SLURM_",
    "FLUX_",
    "PALS_",
    "JSM_",
)


def failure(device: int, program: str = PROGRAM, limit: float = 120) -> str:
    """Return why MPI does not accept the memory of GPU number `device`; an empty string if it does, at least in one process.

    Args:
        device: the GPU's number.
        program: the program of the child, which runs alone and not as a rank of this job.
        limit: the seconds after which the child is killed.
    """
    alone = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(device)], env=alone, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a test transfer did not end within {limit:.0f} s"
    if done.returncode < 0:
        return f"a test transfer ended with {signal.Signals(-done.returncode).name}"
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return f"a test transfer failed: {last}" if done.returncode else ""
