"""Tests run three ways: plain `pytest` (which relaunches the collective tests under mpiexec, see test_under_mpi.py),
`mpirun -n 4 python -m pytest --with-mpi`, and any one test by name.

A test marked `mpi` is collective: every rank runs it. Everything else needs no MPI, or starts its own.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.deadlines import patient

ROOT = Path(__file__).resolve().parent.parent
IMPORTABLE = [ROOT / "tests" / "helpers" / "launched", ROOT]  # by processes that tests start
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
LAUNCHER = (
    "OMPI_",
    "PMI",
    "PRTE_",
    "MPIPS_",
    "SLURM_",
    "HYD",
    "FLUX_",
    "PALS_",
    "JSM_",
    "MPI_LOCAL",
)  # variables that a nested mpiexec must not inherit
LONGEST = [
    "simulated_faults",
    "under_mpi",
    "federated",
    "failure",
    "frameworks",
    "shared_memory_transport",
    "local",
    "asynchronous",
    "resume",
    "lifecycle",
    "bench",
    "examples",
    "documents",
]  # test files that take longest: they come first, so that the two processes of `make test` end together
LOGS = os.environ.get("PYTEST_RANK_LOGS")  # where test_under_mpi.py looks for what each rank did


def launch_environment() -> dict[str, str]:
    """What `mpips run` sets on a small machine, without anything inherited from a launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    return kept | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_MCA_pml": "ob1",  # Open MPI takes a second to look for networks that one machine has not
        "OMPI_MCA_btl": "self,sm,tcp",
        "OMP_NUM_THREADS": "1",
    }


def run(
    command: list[str], cwd: Path, timeout: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own; nothing of it is left behind, however it ends. See `patient`."""
    timeout = patient(timeout)
    variables = launch_environment() | {"MPIEXEC_TIMEOUT": str(int(timeout))} | (environment or {})
    child = subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = child.communicate(timeout=timeout + 15)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)  # mpiexec ends its ranks on SIGTERM, and leaves them on SIGKILL
        out, err = child.communicate(timeout=patient(15))
        pytest.fail(f"{command} did not end within {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def mpiexec_of(python: str) -> list[str]:
    """The mpiexec that lies beside a Python."""
    return [str(Path(python).with_name("mpiexec"))]


@pytest.fixture
def mpirun(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a Python script on n ranks of its own: `mpirun(3, "script.py", "--flag", cwd=..., timeout=60)`."""

    def start(
        n: int,
        *argv: object,
        cwd: Path = tmp_path,
        timeout: float = 90,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [*mpiexec_of(python), "-n", str(n), python, *map(str, argv)]
        return run(command, cwd, timeout, environment)

    return start


@pytest.fixture
def solo(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a Python script in one process without MPI."""

    def start(
        *argv: object, cwd: Path = tmp_path, timeout: float = 90, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, *map(str, argv)], cwd, timeout, environment)

    return start


@pytest.fixture(autouse=True, scope="session")
def _imports_frozen() -> None:
    """What all imports and the collected tests have left is exempt from garbage collection, as `connect` looks at the rest."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _importable() -> None:
    """Whatever process a test starts finds the helpers, and imports torch and mpips in less time."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of them compiles mpips again, half a second
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, IMPORTABLE), *([before] if before else [])])


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test in its own folder, with one thread and an empty command line: run folders go to ./runs.

    Where one rank runs it alone no launcher is seen: what is refused would wait for the other ranks.
    """
    import torch

    if not request.node.get_closest_marker("mpi"):
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.delenv(name, raising=False)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    yield
    torch.set_num_threads(threads)


def pytest_configure(config: pytest.Config) -> None:
    """Ranks above 0 are quiet; what they say goes to a file if somebody asked for it."""
    if RANK and config.getoption("--with-mpi", False):
        target = Path(LOGS, f"rank_{RANK}.out") if LOGS else Path(os.devnull)
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    if LOGS and not RANK:
        config.pluginmanager.register(_Progress(), "progress")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only the collective tests run, no rank imports a file that has none."""
    if config.getoption("--only-mpi") and collection_path.name.startswith("test_"):
        return "mark.mpi" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Collective tests are run by test_under_mpi.py; under mpirun they come first and rank 0 alone runs the rest."""
    collective = [item for item in items if item.get_closest_marker("mpi")]
    rest = [item for item in items if not item.get_closest_marker("mpi")]
    if not config.getoption("--with-mpi") and not config.getoption("--only-mpi"):
        config.hook.pytest_deselected(items=collective)
        items[:] = sorted(rest, key=_place)
        return
    for item in rest:
        if {"mpirun", "mpich"} & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.mpi_skip(reason="starts its own MPI"))
    items[:] = collective + ([] if RANK or config.getoption("--only-mpi") else rest)


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Give a test more time where the machine does other work; before pytest-timeout looks."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getoption("timeout") or item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
    yield


def _place(item: pytest.Item) -> int:
    """The place of a test's file in LONGEST; the others come behind, in the order in which they were found."""
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


class _Progress:
    """Rank 0's note of which test runs and which has passed, so that a hung or failed one is known by name."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped:
            self._say(report.outcome, report.nodeid)

    def _say(self, what: str, nodeid: str) -> None:
        with Path(str(LOGS), "progress").open("a") as file:
            file.write(f"{what} {nodeid}\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Under mpiexec a failure on one rank ends all: the others would wait for it for ever."""
    if LOGS and report.failed:
        with Path(LOGS, f"failed_{RANK}").open("a") as file:
            file.write(f"{report.nodeid} on rank {RANK}:\n{report.longreprtext}\n")
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)


PARSED: dict[object, Any] = {}


@pytest.fixture(autouse=True)
def _settings_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to connect: to parse that takes half the time of so small a run. Files are read each time."""
    from mpips.run import connect as runs

    configure: Any = runs.configure  # type: ignore[attr-defined]

    def once(**settings: Any) -> Any:
        variables = sorted(pair for pair in os.environ.items() if pair[0].startswith("MPIPS_"))
        if "MPIPS_CONFIG" in os.environ or any(word.startswith(("--config", "--mpips.config")) for word in sys.argv):
            return configure(**settings)
        key = repr(settings), repr(variables), repr(sys.argv)
        if key not in PARSED:
            PARSED[key] = configure(**settings)
        return PARSED[key]

    monkeypatch.setattr(runs, "configure", once)
