"""What the pages take from the code when the site is built: settings, combinations of modes, help of the command line.

    {settings} GROUP    a table of a group's settings; without a group, of those at the top
    {table} MODULE      the table in a module's docstring
    {combinations}      which rule and which setting goes with which mode
    {verb} NAME         what `mpips NAME --help` prints
    {packages}          the folders of `mpips/`, each with what it is

Each directive writes Markdown, which the page then holds.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import mpips
from mpips.algorithms.modes import MODES, choose_mode
from mpips.config import GROUPS, Config, ConfigError, allowed, fields
from mpips.rules import RULES


class Generated(SphinxDirective):
    """A directive that writes Markdown."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Give the page what the Markdown says."""
        return self.parse_text_to_nodes("\n".join(self.lines(*self.arguments)))

    def lines(self, name: str = "") -> Iterator[str]:
        """Write the Markdown, line by line."""
        raise NotImplementedError


class Settings(Generated):
    """A table of a group's settings."""

    def lines(self, name: str = "") -> Iterator[str]:
        """See `Generated`."""
        defaults = Config().settings()
        yield from ("| setting | default | allowed | what it does |", "|---|---|---|---|")
        for key, (kind, text) in fields(Config).items():
            if key.rpartition(".")[0] == name:
                yield f"| `{key}` | `{_shown(defaults[key])}` | {_cell(allowed(kind))} | {_cell(text)} |"


class Table(Generated):
    """The table in a module's docstring; the names in its first column are code."""

    def lines(self, name: str = "") -> Iterator[str]:
        """See `Generated`."""
        head, line, *rows = (row for row in (importlib.import_module(name).__doc__ or "").splitlines() if row.startswith("|"))
        yield from (head, line)
        for row in rows:
            _, names, rest = row.split("|", 2)
            yield f"| {', '.join(f'`{one.strip()}`' for one in names.split(','))} |{rest.replace('<', chr(92) + '<')}"


def _shown(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value) or ("[]" if value == () else str(value))


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")


class Combinations(Generated):
    """What goes with which mode."""

    CASES = (
        ("server trains", {"server_trains": True}),
        ("determi- nistic", {"deterministic": True}),
        ("overlap", {"overlap": True}),
        ("backup workers", {"backup_workers": 1}),
        ("reduction sum", {"reduction": "sum"}),
        ("local weights uniform", {"local": {"weights": "uniform"}}),
        ("local fragments", {"local": {"fragments": 2, "steps": 4}}),
    )

    def lines(self, name: str = "") -> Iterator[str]:
        """See `Generated`."""
        robust = [rule for rule in RULES if rule != "mean"]
        heads = ["mode", "rules but `mean`", *(case for case, _ in self.CASES)]
        yield from (f"| {' | '.join(heads)} |", "|---" * len(heads) + "|")
        for mode in MODES:
            rules = [rule for rule in robust if _goes(mode=mode, rule=rule)]
            told = "yes" if rules == robust else ", ".join(rules) or "–"
            cells = ["yes" if _goes(mode=mode, **settings) else "–" for _, settings in self.CASES]
            yield f"| `{mode}` | {' | '.join([told, *cells])} |"


def _goes(**settings: Any) -> bool:
    """Whether such a run would be allowed to begin."""
    groups = {name: dataclasses.replace(getattr(Config(), name), **settings.pop(name)) for name in GROUPS if name in settings}
    try:
        choose_mode(Config(**settings, **groups))
    except ConfigError:
        return False
    return True


class Verb(Generated):
    """What a verb's help says."""

    def lines(self, name: str = "") -> Iterator[str]:
        """See `Generated`."""
        command = [sys.executable, "-m", "mpips.cli.main", *filter(None, [name]), "--help"]
        yield "```text"
        wide = os.environ | {"COLUMNS": "90"}
        yield from subprocess.run(command, env=wide, capture_output=True, text=True, check=True).stdout.splitlines()
        yield "```"


class Packages(Generated):
    """The folders of the package, in the words of each."""

    def lines(self, name: str = "") -> Iterator[str]:
        """See `Generated`."""
        yield from ("| folder | what is in it |", "|---|---|")
        for path in sorted(Path(mpips.__file__).parent.glob("*/__init__.py")):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            yield f"| `mpips/{path.parent.name}/` | {_cell(' '.join(text.partition(chr(10) * 2)[0].split()))} |"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    for directive in (Settings, Table, Combinations, Verb, Packages):
        app.add_directive(directive.__name__.lower(), directive)
    return {"parallel_read_safe": True}
