"""The table of faults in docs/reliability.md, made from what the last run of the tests has written.

    make test                                        writes build/tests.xml
    python -m tests.helpers.reliability build/tests.xml

A test is one fault, unless it has recorded how many it makes (`record_property("faults", n)`). A fault is survived if its test
has passed.
"""

from __future__ import annotations

import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->\n", "<!-- end of faults -->\n"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        fault: what goes wrong.
        right: what is right then.
        tests: the tests, each as the end of its file's name and the beginning of its own.
    """

    fault: str
    right: str
    tests: tuple[str, ...]


ROWS = [
    Row(
        "a worker or rank 0 is killed, under either MPI library",
        "all end, the rank is named; `--retries` ends with the bits of the run that nobody killed",
        (
            "test_failure::test_a_killed_rank",
            "test_retry::test_a_rank_killed",
            "test_resume::test_a_job_killed",
            "test_resume::test_one_process_killed",
            "test_lifecycle::test_under_mpich_too",
            "test_chaos::test_all_faults",
            "test_chaos::test_workers_and_servers",
        ),
    ),
    Row(
        "a worker dies or is stuck, in a run that goes on without it",
        "the weights of those who contributed; with too few, or without the server, the run ends in time",
        ("test_survival::test_",),
    ),
    Row(
        "a simulated rank is killed at any call",
        "the resumed run has the bits of the whole one",
        ("test_resume::test_killed_at_any_call", "test_simulated_requests::test_a_killed_rank"),
    ),
    Row(
        "simulated schedules: deaths, stops, delays, late messages, preemptions, broken disks",
        "weights and metrics of the run in which nothing went wrong; no rank waits for ever",
        ("test_simulated_faults::test_whatever",),
    ),
    Row(
        "a rank is stuck, stopped or slow",
        "it is named, and recorded; after the deadline the run starts again",
        ("test_waits::test_a_slow_worker", "test_waits::test_each_rank_records", "test_waits::test_after", "test_slow_ranks::"),
    ),
    Row(
        "ranks with other models, settings or versions; calls of some ranks alone",
        "refused before anything is sent, by rank and first difference",
        ("test_contract::", "test_failure::test_a_mismatch", "test_failure::test_a_setting", "test_calls::"),
    ),
    Row(
        "NaN, Inf and sums that overflow",
        "raised, skipped or dropped as the setting says, named by rank and tensor",
        (
            "test_round_server::test_nonfinite",
            "test_round_server::test_finite",
            "test_parameter_server::test_a_nan",
            "test_parameter_server::test_nans",
            "test_shared_memory_transport::test_nonfinite",
            "test_shared_memory_transport::test_a_sum",
            "test_multi_node::test_nonfinite",
            "test_multi_node::test_a_sum",
            "test_root_reduce::test_nonfinite",
            "test_root_reduce::test_a_sum",
        ),
    ),
    Row(
        "a power cut at any byte of a save, each renaming lost alone",
        "the new checkpoint or the one before",
        ("test_crash::test_after_a_crash",),
    ),
    Row("a process dies at any step of a save", "the same, and nothing in the way", ("test_crash::test_a_process",)),
    Row(
        "ENOSPC and EIO at any step of a save, limits of size, full and read-only disks",
        "one line, no file left, the checkpoint before stays",
        (
            "test_crash::test_an_error",
            "test_crash::test_a_full_disk",
            "test_crash::test_the_limit",
            "test_crash::test_a_disk",
            "test_failure::test_a_full_disk",
            "test_chaos::test_a_full_disk",
        ),
    ),
    Row(
        "a checkpoint is damaged",
        "refused; the one before is taken, and that is said",
        ("test_hostile::test_no_damage", "test_resume::test_a_damaged", "test_retry::test_a_damaged"),
    ),
    Row(
        "a checkpoint is changed, its SHA-256 made right",
        "a tree or one line, in limited time and memory",
        ("test_hostile::test_any_file",),
    ),
    Row(
        "hostile and foreign files, missing and strange entries",
        "refused by name; no other file is opened",
        (
            "test_hostile::test_an_index",
            "test_hostile::test_a_footer",
            "test_hostile::test_files",
            "test_hostile::test_a_wrong",
            "test_hostile::test_a_path",
            "test_hostile::test_global",
            "test_resume::test_a_checkpoint",
        ),
    ),
    Row(
        "a run goes on from each of its checkpoints, and from a preemption at each line",
        "the bits of the undisturbed run",
        ("test_resume::test_resume_from_every", "test_resume::test_what_a_script_does", "test_resume::test_preempted"),
    ),
    Row(
        "random settings in shared memory",
        "the run by messages; deterministic runs bit for bit",
        ("test_random_settings::test_a_run",),
    ),
    Row("malformed settings", "one line, status 2, no rank left", ("test_bad_settings::", "test_failure::test_bad")),
    Row(
        "an exception, an exit or a leave on one rank",
        "all ranks end, with its traceback or its status",
        (
            "test_failure::test_an_exception",
            "test_failure::test_sys_exit",
            "test_failure::test_whatever",
            "test_lifecycle::test_a_rank",
            "test_lifecycle::test_an_exception",
        ),
    ),
    Row(
        "signals: before the first round, during a write, twice, from SLURM",
        "75 and a checkpoint, or nothing lost; the job goes on",
        ("test_lifecycle::test_usr1", "test_background::test_a_process", "test_launch::test_a_s", "test_slurm::test_a_"),
    ),
    Row(
        "the launcher or mpiexec is killed",
        "no rank, no temporary file and no shared memory is left",
        (
            "test_launch::test_killing",
            "test_launch::test_a_killed_mpiexec",
            "test_launch::test_interrupting",
            "test_failure::test_nothing",
            "test_node_group::test_mapped",
        ),
    ),
]


@dataclass
class Count:
    """What came of the tests of a row.

    Attributes:
        made, survived: faults.
        tests, skipped: tests, and how many of them were not run.
    """

    made: int = 0
    survived: int = 0
    tests: int = 0
    skipped: int = 0

    def add(self, case: ElementTree.Element) -> None:
        """Count a test."""
        self.tests += 1
        if case.find("skipped") is not None:
            self.skipped += 1
            return
        faults = sum(int(found.get("value", "1")) for found in case.iter("property") if found.get("name") == "faults") or 1
        failed = case.find("failure") is not None or case.find("error") is not None
        self.made += faults
        self.survived += 0 if failed else faults


def belongs(pattern: str, file: str, name: str) -> bool:
    """Return whether a test, in a module and with a name, is meant by a pattern of `Row.tests`."""
    module, _, beginning = pattern.partition("::")
    return file.endswith(f".{module}") and name.startswith(beginning or "test_")


def table(report: Path) -> Iterator[str]:
    """Yield the lines of the table, given the report of pytest's `--junitxml`."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = [(case.get("classname", ""), case.get("name", ""), case) for case in suite.iter("testcase")]
    machine = f"{platform.machine()}, Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    day, tests, failures = suite.get("timestamp", "")[:10], int(suite.get("tests", "0")), suite.get("failures")
    yield f"The run of {day}: {tests:,} tests, {failures} failures, {machine}."
    yield ""
    yield from ("| what goes wrong | what is right | tests | faults | survived | lost |", "|---|---|---|---|---|---|")
    for row in ROWS:
        count = Count()
        for file, name, case in cases:
            if any(belongs(pattern, file, name) for pattern in row.tests):
                count.add(case)
        ran = f"{count.tests - count.skipped:,}" + (f" ({count.skipped} skipped)" if count.skipped else "")
        lost = count.made - count.survived
        yield f"| {row.fault} | {row.right} | {ran} | {count.made:,} | {count.survived:,} | {lost:,} |"


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = "\n".join(table(Path(sys.argv[1])))
    PAGE.write_text(f"{before}{BEGIN}\n{lines}\n\n{END}{after}")


if __name__ == "__main__":
    main()
