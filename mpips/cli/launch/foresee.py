"""Errors in a run's settings that the launcher can find before it starts a rank: at once, and reported once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mpips.cli.launch.command import HOST_FLAGS
from mpips.config import Config, ConfigError, check_names, check_resume, check_run_dir, foreseen, whence

FOLDER_FLAGS = {"-wdir", "--wdir", "-wd"}
ELSEWHERE = (  # variables of batch systems, and of files that list hosts: ranks may be on other machines
    *("SLURM_JOB_ID", "PBS_JOBID", "PBS_NODEFILE", "LSB_JOBID", "FLUX_URI", "PE_HOSTFILE", "COBALT_JOBID", "HYDRA_HOST_FILE"),
    *("PRTE_MCA_prte_default_hostfile", "OMPI_MCA_orte_default_hostfile"),
)


def foresee(settings: Mapping[str, str], script: Sequence[str], mpi_args: Sequence[str]) -> Config:
    """Check what the ranks will be told, and return it, as far as it is known here.

    Only the ranks can check what the script passes to `connect` or takes through its own parser, what a rule's module contains,
    and whether settings go together. Paths are checked only if rank 0 will be on this machine and in this folder.

    Args:
        settings: the values of `--set`.
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
    return resolved.config
