"""What the launcher can say of a run's settings before it starts a rank: in a moment, and once instead of by each rank."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mpips.cli.launch.command import HOST_FLAGS
from mpips.config import ConfigError, check_names, check_resume, check_run_dir, foreseen, whence

FOLDER_FLAGS = {"-wdir", "--wdir", "-wd"}
ELSEWHERE = (  # variables of those who have given us machines, or name their file
    *("SLURM_JOB_ID", "PBS_JOBID", "PBS_NODEFILE", "LSB_JOBID", "FLUX_URI", "PE_HOSTFILE", "COBALT_JOBID", "HYDRA_HOST_FILE"),
    *("PRTE_MCA_prte_default_hostfile", "OMPI_MCA_orte_default_hostfile"),
)


def foresee(settings: Mapping[str, str], script: Sequence[str], mpi_args: Sequence[str]) -> None:
    """Look at what the ranks will be told.

    What the script says to `connect` or takes through its own parser, what a rule's module holds and how settings go together
    the ranks see. Paths are looked at where rank 0 will be on this machine, in this folder.

    Args:
        settings: what was given to `--set`.
        script: a file and its flags.
        mpi_args: further flags for mpiexec.

    Raises:
        ConfigError: one line.
    """
    resolved = foreseen(settings, script[1:])
    try:
        check_names(resolved.config)
        words = {word.split("=")[0] for word in mpi_args}
        if not words & (HOST_FLAGS | FOLDER_FLAGS) and not any(name in os.environ for name in ELSEWHERE):
            check_resume(resolved.config.resume)
            check_run_dir(resolved.config.run_dir)
    except ConfigError as error:
        raise whence(error, resolved.origins) from None
