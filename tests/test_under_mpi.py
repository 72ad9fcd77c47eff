"""The collective tests, relaunched under mpiexec once per number of ranks and MPI library.

A launch ends at its first failure or hang; the next one goes on behind it, so a bad test fails alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, mpiexec_of, run

LAUNCH = 1500  # seconds that one launch of all may take, where two suites share two cores; what hangs is ended by HANG
pytestmark = [pytest.mark.mpi_skip, pytest.mark.timeout(2 * LAUNCH)]
HANG = 60  # seconds that one collective test may take
MPICH = Path(os.environ.get("MPICH_PYTHON", ROOT / ".venv-mpich" / "bin" / "python"))


def outcomes(python: str, ranks: int, logs: Path, skip: list[str], *tests: str) -> tuple[list[str], list[str], str]:
    """One launch: the tests that passed or were skipped, those that failed or hung, and what was printed."""
    logs.mkdir(parents=True)
    command = [*mpiexec_of(python), "-n", str(ranks), python, "-m", "pytest", "--with-mpi", "--only-mpi"]
    command += [
        "-q",
        "--color=no",
        "-p",
        "no:cacheprovider",
        f"--timeout={HANG}",
        *(f"--deselect={name}" for name in skip),
        *tests,
    ]
    done = run(command, ROOT, timeout=LAUNCH, environment={"PYTEST_RANK_LOGS": str(logs)})
    notes = (
        [line.split(" ", 1) for line in (logs / "progress").read_text().splitlines()] if (logs / "progress").exists() else []
    )
    ended = [name for what, name in notes if what in ("passed", "skipped")]
    begun = [name for what, name in notes if what == "start"]
    broken = [name for name in begun if name not in ended]
    failed = {file.read_text().split(" on rank", 1)[0] for file in logs.glob("failed_*")}
    said = "\n".join([done.stdout[-3000:], done.stderr[-3000:], *(file.read_text() for file in logs.glob("failed_*"))])
    if done.returncode == 0:
        return ended, [], said
    return [name for name in ended if name not in failed], sorted(failed) or broken[-1:], said


def relaunch(python: str, ranks: int, logs: Path, *tests: str) -> list[str]:
    """Launch until every test has had its turn; returns what is wrong, by test."""
    passed: list[str] = []
    wrong: dict[str, str] = {}
    for attempt in range(10):
        ended, failed, said = outcomes(python, ranks, logs / str(attempt), passed + list(wrong), *tests)
        passed += ended
        if not failed:
            break
        wrong |= dict.fromkeys(failed, said)
    else:
        wrong["more than 10 tests"] = ""
    assert passed, f"no collective test ran: {said}"
    return [f"{name} failed or hung:\n{said}" for name, said in wrong.items()]


@pytest.mark.parametrize("ranks", [2, 4])
def test_collective_suite(ranks: int, tmp_path: Path) -> None:
    wrong = relaunch(sys.executable, ranks, tmp_path / "logs")
    assert not wrong, "\n\n".join(wrong)


def test_collective_suite_on_the_other_mpi(tmp_path: Path) -> None:
    if not MPICH.exists():
        pytest.skip(f"no second environment with MPICH at {MPICH}; `make test` makes it")
    wrong = relaunch(str(MPICH), 3, tmp_path / "logs")
    assert not wrong, "\n\n".join(wrong)


def test_a_hung_and_a_failing_test_fail_alone(tmp_path: Path) -> None:
    bad = tmp_path / "test_bad.py"
    bad.write_text(
        "import time, pytest\n"
        "from mpi4py import MPI\n"
        "@pytest.mark.mpi\n"
        "def test_fine(): MPI.COMM_WORLD.Barrier()\n"
        "@pytest.mark.mpi\n"
        "@pytest.mark.timeout(5, method='thread')\n"
        "def test_hangs():\n"
        "    if MPI.COMM_WORLD.rank: MPI.COMM_WORLD.Barrier()\n"
        "    time.sleep(30)\n"
        "@pytest.mark.mpi\n"
        "def test_fails_on_one_rank():\n"
        "    assert MPI.COMM_WORLD.rank != 1\n"
        "    MPI.COMM_WORLD.Barrier()\n"
        "@pytest.mark.mpi\n"
        "def test_also_fine(): MPI.COMM_WORLD.Barrier()\n"
    )
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    wrong = relaunch(sys.executable, 2, tmp_path / "logs", f"--rootdir={tmp_path}", str(bad))
    assert [text.split(" ")[0].split("::")[1] for text in wrong] == ["test_hangs", "test_fails_on_one_rank"]
    assert subprocess.run(["pgrep", "-f", str(bad)], capture_output=True).returncode == 1, "ranks were left behind"
