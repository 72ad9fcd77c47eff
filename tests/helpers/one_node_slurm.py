"""A real SLURM on this machine for the tests: munged, slurmctld and one slurmd per node, in one folder, on free ports.

Nothing of the machine's own SLURM or munge is read or changed, and all that was started is ended by its process id. Where
the kernel allows it there are two nodes, each in a UTS namespace with a host name of its own, as PMIx tells nodes apart by
that; else one. Every node pretends to 64 CPUs and 4 GPUs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "slurmctld slurmd slurm-client munge libpmix-dev"  # Debian's; the last has the libpmix.so that srun loads


def missing() -> str:
    """Why there can be no SLURM here; empty if there can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {PACKAGES}"
    return "" if os.geteuid() == 0 else "slurmd must be started by root"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Slurm:
    """A running cluster.

    Attributes:
        nodes: the nodes' names.
        environment: the variables that its commands need.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._daemons = folder, list[subprocess.Popen[bytes]]()
        namespaces = subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0
        self.nodes = ["n1", "n2"] if namespaces else [socket.gethostname()]
        self._conf = folder / "slurm.conf"
        self.environment = environment | {"PATH": f"{environment['PATH']}:{_path()}", "SLURM_CONF": str(self._conf)}

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        self._write_configuration()
        kinds = ("socket", "key-file", "log-file", "pid-file", "seed-file")
        files = [f"--{kind}={self._folder}/munge.{kind}" for kind in kinds]
        self._daemon("munged", "--foreground", "--force", *files)
        wait(lambda: (self._folder / "munge.socket").exists(), 10, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in self.nodes:
            named = ["unshare", "--uts", "sh", "-c", f'hostname {node} && exec "$@"', "sh"] if len(self.nodes) > 1 else []
            self._daemon(*named, "slurmd", "-D", "-N", node)
        states = ["idle"] * len(self.nodes)
        wait(lambda: self.run("sinfo", "--Node", "--noheader", "--format=%T").stdout.split() == states, 30, "the nodes")

    def run(self, *command: object, cwd: Path | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands to its end."""
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def field(self, job: str, name: str) -> str:
        """One field of a job, as JobState."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return next((word.partition("=")[2] for word in shown.split() if word.startswith(name + "=")), "")

    def stop(self) -> None:
        """End all jobs and daemons."""
        if len(self._daemons) > 1:
            with suppress(subprocess.TimeoutExpired, TimeoutError):
                self.run("scancel", "--me", timeout=10)
                wait(lambda: not self.run("squeue", "--noheader", timeout=10).stdout.strip(), 15, "the end of all jobs")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        for pid in self.processes():  # a slurmstepd and its tasks outlive their slurmd
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait(5)
        wait(lambda: not self.processes(), 10, "the end of all processes")

    def processes(self) -> list[int]:
        """The ids of the processes that have this cluster's configuration in their environment."""
        mark = f"SLURM_CONF={self._conf}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return found

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self._folder.glob("*.log")))

    def _daemon(self, *command: str) -> None:
        quiet = subprocess.DEVNULL  # they write their own logs
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet))

    def _write_configuration(self) -> None:
        key = self._folder / "munge.key-file"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for node in self.nodes:
            (self._folder / f"spool-{node}").mkdir()
            (self._folder / f"tmp-{node}").mkdir()
        (self._folder / "state").mkdir()
        for gpu in range(4):  # a GPU's file must be a device, no matter which
            os.mknod(self._folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self._folder / "gres.conf").write_text(f"Name=gpu File={self._folder}/gpu[0-3]\n")
        controller, *ports = _free_ports(1 + len(self.nodes))
        self._conf.write_text(
            f"""ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self._folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
KillWait=2
ReturnToService=2
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={self._folder}/state
SlurmdSpoolDir={self._folder}/spool-%n
TmpFS={self._folder}/tmp-%n
SlurmctldPidFile={self._folder}/slurmctld.pid
SlurmdPidFile={self._folder}/slurmd-%n.pid
SlurmctldLogFile={self._folder}/slurmctld.log
SlurmdLogFile={self._folder}/slurmd-%n.log
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
            + "".join(
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=4000 Gres=gpu:4\n"
                for node, port in zip(self.nodes, ports, strict=True)
            )
        )


def wait(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something has happened.

    Raises:
        TimeoutError: it has not, within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in taken]
    for server in taken:
        server.close()
    return ports
