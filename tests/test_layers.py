"""The walls of the house: imports point down only, and some imports have one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mpips
from tests.helpers.deadlines import patient

PACKAGE = Path(mpips.__file__).parent
LEVELS = [
    {"run", "cli"},
    {"worker"},
    {"server"},
    {"reduce"},
    {"algorithms"},
    {"comm", "optim"},
    {"data", "model", "report", "rules"},
    {"checkpoint", "config", "process"},
]
LEVEL = {box: -depth for depth, boxes in enumerate(LEVELS) for box in boxes}
HOMES = {"mpi4py": ("comm/", "process/", "cli/bench/"), "h5py": ("checkpoint/", "cli/bench/"), "rich": ("cli/",)}
MODULES = {".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules imported anywhere in a file, also lazily, but for the type checker; `from mpips import x` counts as mpips.x."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES or node.module == "mpips" else node.module for name in whole}
    return names


def within(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_box_has_a_level() -> None:
    boxes = {within(path).split("/")[0] for path in MODULES.values()} - {"__init__.py"}
    assert boxes == set(LEVEL)
    assert len(boxes) <= 15
    assert len(LEVELS) <= 8


@pytest.mark.parametrize("box", sorted(LEVEL))
def test_imports_point_down(box: str) -> None:
    for path in (PACKAGE / box).rglob("*.py"):
        for name in imported(path):
            _, _, other = name.partition("mpips.")
            other = other.split(".")[0]
            assert other in ("", box) or other not in LEVEL or LEVEL[other] < LEVEL[box], f"{within(path)} imports {name}"


def test_modules_have_no_import_circle() -> None:
    order = TopologicalSorter({name: imported(path) & set(MODULES) for name, path in MODULES.items()})
    order.prepare()


@pytest.mark.parametrize("library", HOMES)
def test_some_libraries_have_one_home(library: str) -> None:
    users = [path for path in MODULES.values() if any(name.split(".")[0] == library for name in imported(path))]
    assert [within(path) for path in users if not within(path).startswith(HOMES[library])] == []


def test_few_ask_for_the_servers_rank() -> None:
    users = {within(path) for path in MODULES.values() if "SERVER" in path.read_text()}
    assert {name for name in users if not name.startswith("comm/")} == {
        "run/connect.py", "run/roles.py", "run/failure.py", "server/contract.py"
    }  # fmt: skip


def test_importing_mpips_starts_nothing() -> None:
    program = "import sys, mpips, mpips.cli.main; print([m for m in ('mpi4py', 'torch', 'h5py') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=patient(60))
    assert out.stdout.strip() == "[]"
    program = "import sys, mpips.run.connect; print('mpi4py' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=patient(60))
    assert out.stdout.strip() == "False"


def test_the_public_names_are_what_all_says() -> None:
    assert sorted(mpips.__all__) == mpips.__all__
    assert all(getattr(mpips, name) is not None for name in mpips.__all__)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = mpips.conect  # type: ignore[attr-defined]


# What runs code that somebody else may have written, by its full name; `torch.save` of `mpips export` alone writes a pickle.
SINKS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load"),
    *(
        "torch.package.PackageImporter",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "numpy.load",
        "np.load",
    ),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.unsafe_load_all", "yaml.full_load_all", "runpy.run_path"),
}
ALLOWED = {("cli/main.py", "torch.save")}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
# mpi4py's methods that pickle. `reduce`, `gather`, `scatter` are names of others, too: of an MPI communicator alone.
PICKLING = {
    *("bcast", "allreduce", "alltoall", "allgather", "scan", "exscan", "sendrecv", "isend", "irecv", "issend", "ibsend"),
    *("ssend", "bsend", "mprobe", "improbe", "recv_init"),
}
OF_COMMUNICATORS = {"reduce", "gather", "scatter", "send", "recv"}
COMMUNICATORS = {
    "comm",
    "_comm",
    "node",
    "_node",
    "COMM_WORLD",
    "COMM_SELF",
    "world",
    "_world",
}


def unsafe(code: str, imports_mpi: bool) -> list[str]:
    """The sinks in a source: calls and names, imports, subprocesses with a shell."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in PICKLES]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in SINKS:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in SINKS:
                found.append(node.func.id)
            found += [
                f"{word.arg}=" for word in node.keywords if word.arg in ("shell", "allow_pickle") and not is_false(word.value)
            ]
            if isinstance(node.func, ast.Attribute) and imports_mpi:
                whose = ast.unparse(node.func.value).split(".")[-1]
                pickles = (node.func.attr in PICKLING and whose not in ("self", "_leaders")) or (
                    node.func.attr in OF_COMMUNICATORS and whose in COMMUNICATORS
                )
                found += [f"{whose}.{node.func.attr}"] if pickles else []
    return found


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", MODULES.values(), ids=within)
def test_nothing_unsafe_is_called(path: Path) -> None:
    mpi = within(path).startswith(HOMES["mpi4py"])
    assert [sink for sink in unsafe(path.read_text(), mpi) if (within(path), sink) not in ALLOWED] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from dill import loads", "import torch\ntorch.load(x)", "load = torch.load", "eval(x)", "exec(x)",
        "yaml.load(x, Loader=yaml.SafeLoader)", "yaml.parse(x, Loader=yaml.UnsafeLoader)", "np.load(x)", "os.system(x)",
        "subprocess.run(x, shell=True)", "f(x, allow_pickle=yes)", "comm.bcast(x)", "MPI.COMM_WORLD.reduce(x)",
        "self._comm.send(x, 1)", "node.allgather(x)", "__import__(x)",
    ],
)  # fmt: skip
def test_what_is_unsafe_is_found(code: str) -> None:
    assert unsafe(code, imports_mpi=True)


def test_what_is_safe_is_let_be() -> None:
    code = "model.eval()\nre.compile(x)\nyaml.safe_load(x)\nself.transport.reduce(x)\ncomm.Bcast(x)\nf(x, allow_pickle=False)"
    assert unsafe(code, imports_mpi=True) == []
    assert unsafe("work.gather(x)\nf(shell=False)", imports_mpi=True) == []
