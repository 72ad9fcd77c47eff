"""README.md and docs/: the code in them runs, what it prints is what they show, links lead somewhere, and the site builds.

How a page says what is to be done with a block of code, in a comment on the line before it:

    nothing           python: run, one block after the other in one process; sh: read by bash, not run
    run               sh: run, with bash -e, in the page's folder, where the repository's folders are
    skip: why         python: compiled, not run
    file: NAME        kept as this file
    patch: NAME       a difference to that file
    prints            text: what the block before it prints. "..." stands for the rest of a line, or alone for any lines
    prints about      the same, with other numbers
    prints among      the lines are among what it prints, in any order
    prints about among

`<!-- python`, code, `-->`, each on lines of their own, is code that runs and is not shown. Every page has a folder of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest

from mpips import rules
from mpips.algorithms import modes
from mpips.config import GROUPS, Config, fields
from tests.conftest import ROOT, run
from tests.helpers import reliability
from tests.helpers.run_page import MARK

README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").rglob("*.md")])
OTHERS = [*ROOT.glob("[A-Z]*.md"), ROOT / "slurm" / "README.md", ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^(`{3,}|:{3,})\s*(\S*)")
COMMENT = re.compile(r"^<!-- (.*) -->$")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)|<(?:img|a)[^>]* (?:src|href)=\"([^\"]+)\"")
NUMBER = re.compile(r"\d[\d,]*(?:\\\.\d+)?(?:e\\?[-+]?\d+)?")  # in what re.escape gives
TEST = re.compile(r"^def (test_\w+)", re.MULTILINE)
ANY_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


@dataclasses.dataclass
class Block:
    """A block of code, or a hidden comment, of a page.

    Attributes:
        language, text, line: what stands behind the fence; its lines; where it begins.
        mark: the comment before it.
    """

    language: str
    text: str
    line: int
    mark: str = ""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parsed(path: Path) -> tuple[list[Block], list[str]]:
    """The blocks of a page, and its lines outside of them."""
    blocks: list[Block] = []
    prose: list[str] = []
    mark, fence, hidden = "", "", False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = FENCE.match(line)
        if fence or hidden:
            if line == "-->" if hidden else line.startswith(fence):
                fence, hidden = "", False
            else:
                blocks[-1].text += line + "\n"
        elif found:
            fence, language = found.groups()
            blocks.append(Block(language, "", number, mark))
        elif line in ("<!-- python", "<!-- sh"):
            hidden = True
            blocks.append(Block(line.split()[1], "", number, "run"))
        elif comment := COMMENT.match(line):
            mark = comment[1]
            continue
        else:
            prose.append(line)
        if line.strip():
            mark = ""
    assert not fence, f"{name_of(path)}: a block is not closed"
    return blocks, prose


def steps(path: Path) -> Iterator[tuple[list[str], Block | None]]:
    """What to do with a page's blocks, and the block that says what each prints."""
    last: list[str] | None = None
    for block in parsed(path)[0]:
        kind, _, name = block.mark.partition(": ")
        step: list[str] | None = None
        if kind.split(" ")[0] == "prints":
            assert last, f"{name_of(path)}:{block.line}: nothing is run before it"
            yield last, block
            last = None
        elif kind in ("file", "patch"):
            step = [kind, block.text, name, str(block.line)]
        elif block.language == "python" and kind != "skip":
            step = ["python", block.text, name_of(path), str(block.line)]
        elif block.language == "sh" and kind == "run":
            step = ["sh", block.text, name_of(path), str(block.line)]
        if step:
            if last:
                yield last, None
            last = step
    if last:
        yield last, None


def pattern(line: str, about: bool) -> str:
    """A line as a regular expression."""
    parts = [re.escape(part) for part in line.rstrip().split("...")]
    if about:
        parts = [NUMBER.sub(lambda _: ANY_NUMBER, part) for part in parts]
    return re.sub(r"(?:\\ )+", " +", ".*".join(parts))


def missing(shown: Block, got: str) -> str:
    """What of the text that a page shows was not printed; empty if all was."""
    words = shown.mark.split()
    lines = [line.rstrip() for line in got.strip("\n").splitlines()]
    wanted = [(line, pattern(line, "about" in words)) for line in shown.text.strip("\n").splitlines()]
    if "among" in words:
        return "\n".join(line for line, each in wanted if not any(re.fullmatch(each, other) for other in lines))
    whole = "".join("(?:.*\n)*" if line == "..." else each + "\n" for line, each in wanted)
    return "" if re.fullmatch(whole, "\n".join(lines) + "\n") else shown.text


def runs_something(path: Path) -> bool:
    return any(step[0] in ("python", "sh") for step, _ in steps(path))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", [name_of(path) for path in PAGES if runs_something(path)])
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page: str, tmp_path: Path) -> None:
    todo = list(steps(ROOT / page))
    (tmp_path / "page").mkdir()
    for folder in ("examples", "benchmarks", "slurm", "docs"):
        (tmp_path / "page" / folder).symlink_to(ROOT / folder)
    (tmp_path / "steps.json").write_text(json.dumps([step for step, _ in todo]))
    here = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = run([sys.executable, str(ROOT / "tests" / "helpers" / "run_page.py"), "../steps.json"], tmp_path / "page", 360, here)
    got = done.stdout.split(MARK)[1:]
    assert done.returncode == 0, f"{page}: {got[-1]}\n{done.stderr}"
    for (step, shown), text in zip(todo, got, strict=True):
        if shown:
            text = text.partition("\n")[2]
            lacks = missing(shown, text)
            assert not lacks, f"{page}:{shown.line} shows\n{lacks}\nbut line {step[3]} printed\n{text}"


def test_what_a_page_shows_is_compared() -> None:
    def lacks(mark: str, shown: str, got: str) -> bool:
        return bool(missing(Block("text", shown, 1, mark), got))

    assert not lacks("prints", "a 1\nb ... c\n", "a 1\nb x y c\n")
    assert lacks("prints", "a 1\n", "a 2\n")
    assert lacks("prints", "a 1\n", "a 1\nb\n")
    assert not lacks("prints", "a\n...\nd\n", "a\nb\nc\nd\n")
    assert not lacks("prints about", "a 1.5 b (1,024)\n", "a 23 b (7)\n")
    assert lacks("prints about", "a 1.5 b\n", "a b\n")
    assert not lacks("prints among", "b\na\n", "a\nc\nb\n")
    assert lacks("prints among", "d\n", "a\nc\nb\n")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_block_can_be_read(path: Path) -> None:
    for block in parsed(path)[0]:
        if block.language == "python":
            compile(block.text, f"{name_of(path)}:{block.line}", "exec")
        if block.language == "sh":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            assert not done.returncode, f"{name_of(path)}:{block.line}: {done.stderr}"


def slugs(path: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    found: list[str] = []
    for line in parsed(path)[1]:
        if heading := re.match(r"#{1,6} (.*)", line):
            plain = re.sub(r"[^\w\- ]", "", unescape(heading[1]).lower()).strip().replace(" ", "-")
            found.append(f"{plain}-{found.count(plain)}" if plain in found else plain)
    return found


@pytest.mark.parametrize("path", sorted({*PAGES, *OTHERS}), ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", "\n".join(parsed(path)[1]))
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        where = f"{name_of(path)}: {target}"
        if re.match(r"\w+:", target):
            parts = urlsplit(target)
            assert parts.scheme == "https", where
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), where
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), where
        assert there.is_relative_to(ROOT), where
        if anchor:
            assert anchor in slugs(there), f"{where}: has {slugs(there)}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_and_setting_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    for word in (word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()):
        if re.fullmatch(r"(benchmarks|docs|examples|flux|lsf|mpips|pbs|slurm|tests)/[\w./-]*", word):
            assert (ROOT / word).exists(), f"{name_of(path)}: {word}"
    known = {*fields(Config), "config", "print_config"}
    named = re.findall(r"--mpips\.([a-z_][\w.]*\w)|--set ([a-z_][\w.]*\w)=", text)
    named += re.findall(rf"`((?:{'|'.join(GROUPS)})\.[a-z_]\w*)[=`]", text)
    for name in ("".join(found) for found in named):
        assert name in known or name.endswith(".py"), f"{name_of(path)}: {name}"
    variables = {f"MPIPS_{key.upper().replace('.', '__')}" for key in known}
    for name in re.findall(r"\bMPIPS_[A-Z_]+\b(?!\*)", text):
        assert name in variables | {"MPIPS_TEST_MNIST"}, f"{name_of(path)}: {name}"


def table(path: Path, head: str) -> list[list[str]]:
    """The rows of a page's table whose first head is that."""
    lines = parsed(path)[1]
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize(("module", "known"), [(modes, modes.MODES), (rules, rules.RULES)])
def test_every_mode_and_rule_has_its_row(module: ModuleType, known: dict[str, object]) -> None:
    rows = [row.split("|")[1] for row in (module.__doc__ or "").splitlines() if row.startswith("|")]
    assert sorted(re.findall(r"\w+", " ".join(rows[2:]))) == sorted(known)
    assert f"```{{table}} {module.__name__}\n```" in (ROOT / "docs" / "reference" / "modes.md").read_text()


def test_the_table_of_faults_names_tests_that_exist() -> None:
    named = [(path.stem, found) for path in (ROOT / "tests").rglob("test_*.py") for found in TEST.findall(path.read_text())]
    patterns = [pattern for row in reliability.ROWS for pattern in row.tests]
    assert [p for p in patterns if not any(reliability.belongs(p, f"x.{file}", name) for file, name in named)] == []
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert [row.fault for row in reliability.ROWS if f"| {row.fault} |" not in page] == []


def test_the_table_of_faults_counts_what_a_run_has_written(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite tests="5" failures="1" timestamp="2026-11-30T08:00:00">'
        '<testcase classname="tests.checkpoint.test_hostile" name="test_no_damage_is_accepted">'
        '<properties><property name="faults" value="10000"/></properties></testcase>'
        '<testcase classname="tests.promises.test_resume" name="test_a_damaged_newest[1]"><failure/></testcase>'
        '<testcase classname="tests.cli.test_retry" name="test_a_damaged_checkpoint"/>'
        '<testcase classname="tests.cli.test_retry" name="test_a_damaged_one"><skipped/></testcase>'
        '<testcase classname="tests.cli.test_other_retry" name="test_a_damaged_one"/></testsuite></testsuites>'
    )
    lines = list(reliability.table(report))
    assert lines[0].startswith("The run of 2026-11-30: 5 tests, 1 failures, ")
    (damaged,) = [line for line in lines if line.startswith("| a checkpoint is damaged |")]
    assert damaged.endswith("| 3 (1 skipped) | 10,002 | 10,001 | 1 |")


def test_every_group_of_settings_has_its_table() -> None:
    tables = re.findall(r"^```\{settings\} ?(\w*)$", (ROOT / "docs" / "reference" / "settings.md").read_text(), re.MULTILINE)
    assert sorted(tables) == sorted(["", *GROUPS])


def test_every_page_is_in_the_site() -> None:
    named = {"docs/index.md"}
    for path in PAGES:
        for block in parsed(path)[0]:
            if block.language == "{toctree}":
                entries = [line for line in block.text.splitlines() if line and not line.startswith(":")]
                named |= {name_of((path.parent / f"{entry}.md").resolve()) for entry in entries}
    assert named == {name_of(path) for path in PAGES if path != README}


@pytest.mark.timeout(200)
@pytest.mark.skipif(not all(map(find_spec, ("sphinx", "myst_parser", "furo"))), reason="no sphinx, myst_parser or furo here")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path / "site")]
    done = run(build, ROOT, 150)
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "site" / "reference" / "settings.html").read_text()
    for key in fields(Config):
        assert f">{key}<" in settings, key
    assert "NotImplementedError" not in (tmp_path / "site" / "reference" / "modes.html").read_text()
