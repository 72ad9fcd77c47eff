"""The command `mpips`: its verbs, their flags, their exit statuses.

Invariant: a verb imports what it needs when it runs, so that help and errors appear at once. Bad usage is reported in one line
that names the flag, what was given and what is allowed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpips import __version__
from mpips.cli.bench import flags
from mpips.config import BAD_CONFIGURATION, ConfigError, whole_line
from mpips.config.names import codec_names
from mpips.process.lifecycle import emit
from mpips.report import stdout

if TYPE_CHECKING:
    import torch

STATUSES = """\
exit statuses:
  0   success
  1   the run or the verb failed
  2   bad usage or configuration
  75  preempted: checkpoint written, start again with --mpips.resume auto"""
TAKES_VALUE = ("-n", "-np", "--mpi-args", "--timeout", "--retries", "--set")
MOST_RANKS = 1_000_000  # that `mpips plan` accepts
LONGEST_VALUE = 60  # characters of an attribute shown by inspect


class VerbError(Exception):
    """A verb that failed: exit status 1."""

    status = 1


class UsageError(VerbError):
    """A verb that cannot do what was asked: exit status 2."""

    status = 2


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors that does not guess abbreviated flags."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        emit(2, f"{self.prog}: {message}\n")
        self.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:  # argparse would ignore that help cannot be written
            stdout.write(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status, which is not 0 if the verb's output could not be written."""
    own, script = _split(whole_line() if argv is None else list(argv))
    try:
        return _run(own, script)
    except stdout.OutputError as error:
        if str(error):
            emit(2, f"mpips {own[0]}: {error}\n")
        return error.status


def _run(own: list[str], script: list[str]) -> int:
    """Parse the flags and call the verb; return the exit status."""
    parser = _parser()
    options, unknown = parser.parse_known_args(own, argparse.Namespace(script=script))
    if unknown:
        hint = "; the script's own flags go after the script, a setting into --set KEY=VALUE" if own[0] == "run" else ""
        parser.error(f"{own[0]}: {unknown[0]!r} given, expected the flags that mpips {own[0]} --help lists{hint}")
    try:
        return int(options.verb(options))
    except (VerbError, OSError, ConfigError) as error:
        setting = isinstance(error, ConfigError)  # printed as by a rank
        status = BAD_CONFIGURATION if setting else getattr(error, "status", 1)
        emit(2, f"mpips: {error}\n" if setting else f"mpips {own[0]}: {error}\n")
        if options.json:
            stdout.write(json.dumps({"exit": status, "error": str(error)}))
        return int(status)
    except KeyboardInterrupt:
        return 1


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line of `run` into mpips' flags and the script with its flags. For other verbs all is mpips'.

    argparse would look for mpips' flags among the script's.
    """
    if argv[:1] != ["run"]:
        return argv, []
    own, at = ["run"], 1
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        if argv[at] in TAKES_VALUE and at + 1 < len(argv):
            # Joined: argparse refuses a value that itself begins with a dash, as mpiexec's flags do.
            own += [f"{argv[at]}={argv[at + 1]}"] if argv[at].startswith("--") else argv[at : at + 2]
            at += 2
        else:
            own.append(argv[at])
            at += 1
    return own, argv[at + 1 :] if argv[at : at + 1] == ["--"] else argv[at:]


def _parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(prog="mpips", description="An MPI parameter server for PyTorch.", epilog=STATUSES)
    parser.add_argument("--version", action="version", version=f"mpips {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    run = _verb(verbs, "run", run_verb, "start a script on N ranks and watch it",
                usage="mpips run -n N [flags] script.py [the script's own flags]")  # fmt: skip
    run.add_argument("-n", "-np", dest="size", type=_whole, metavar="N", help="ranks: the server and N-1 workers")
    run.add_argument("--dry-run", action="store_true", help="print the command and do nothing")
    run.add_argument("--mpi-args", type=_words, default=[], metavar='"..."', help="further flags for mpiexec")
    run.add_argument("--timeout", type=_seconds, metavar="S", help="end the run after S seconds")
    run.add_argument("--retries", type=_count, default=0, metavar="K",
                     help="after a rank has died start again from the last checkpoint, at most K times (0)")  # fmt: skip
    run.add_argument("--ft", action="store_true",
                     help="let the others live when a rank dies (Open MPI 5); so it is where min_workers is seen")  # fmt: skip
    run.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE",
                     help="a setting of mpips, e.g. clip=1.0, whatever the script's line says; may be repeated")  # fmt: skip
    run.add_argument("--print_config", action="store_true", help="print all settings and where each comes from, and end")

    inspect = _verb(verbs, "inspect", inspect_verb, "show what a checkpoint holds")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, or a run folder (its newest one)")

    export = _verb(verbs, "export", export_verb, "write a checkpoint's model as a state_dict")
    export.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, or a run folder (its newest one)")
    export.add_argument("--to", type=_target, required=True, metavar="PATH", help="x.pt or x.safetensors")

    verify = _verb(verbs, "verify", verify_verb, "say which checkpoints of a run are whole, and what a resume would take")
    verify.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a checkpoint")

    _verb(verbs, "env", env_verb, "describe this machine, for a bug report")

    text = "measure mpips beside the hardware's limit, raw MPI and DDP, interleaved in one run"
    flags.add_kinds(_verb(verbs, "bench", bench_verb, text))
    _add_plan(verbs)
    return parser


def _add_plan(verbs: argparse._SubParsersAction[Parser]) -> None:
    """Add the verb `plan`."""
    add = _verb(
        verbs, "plan", plan_verb, "predict memory, bytes and time of a round on machines that are not here"
    ).add_argument
    add("--nodes", type=_whole, required=True, metavar="N", help="nodes")
    add("--ranks-per-node", type=_whole, required=True, metavar="H", help="ranks of each; rank 0 is the server")
    add("--model-mb", type=_number(1e-5, 1e6), required=True, metavar="MB", help="the model, of float32, in 10^6 bytes")
    add("--gbit", type=_number(1e-3, 1e6), required=True, metavar="G", help="Gbit/s of a node's link, each way")
    add("--latency-us", type=_number(0, 1e6), default=2.0, metavar="US", help="until a message arrives (2)")
    add("--message-us", type=_number(0, 1e6), default=0.5, metavar="US", help="to begin and end one send or receive (0.5)")
    add(
        "--memory-gbs",
        type=_number(1e-3, 1e6),
        default=200.0,
        metavar="G",
        help="GB/s that a node's ranks read and write (200)",
    )
    add("--comm-dtype", choices=codec_names(), default="full", help="between nodes, as the setting (full)")
    add("--plan", choices=["auto", "root", "sharded"], default="auto", help="who steps, as the setting (auto)")
    add("--bucket-cap-mb", type=_number(0.001, 1000), default=16.0, metavar="MB", help="as the setting (16)")
    add(
        "--optimizer-floats",
        type=_number(0, 100),
        default=2.0,
        metavar="K",
        help="kept of each parameter: Adam 2, momentum 1 (2)",
    )


def _verb(verbs: argparse._SubParsersAction[Parser], name: str, call: Callable[..., int], text: str, **keywords: Any) -> Parser:
    """Add a verb with its `--json` flag, and return its parser."""
    parser = verbs.add_parser(name, help=text, description=text, epilog=STATUSES, **keywords)
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.set_defaults(verb=call)
    return parser


def _whole(text: str) -> int:
    """Return the text as a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    """Return the text as a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number of at least 0")
    return int(text)


def _seconds(text: str) -> int:
    """Return a text as whole seconds, rounded up."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a number of seconds above 0")
    return math.ceil(seconds)  # MPIEXEC_TIMEOUT takes whole seconds


def _number(least: float, most: float) -> Callable[[str], float]:
    """Return a function that converts a text to a number within these limits."""

    def number(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{text!r} given, expected a number from {least:g} to {most:g}")
        return found

    return number


def _words(text: str) -> list[str]:
    """Return the words of a text as a shell would split it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected words as in a shell ({error})") from error


def _setting(text: str) -> tuple[str, str]:
    """Return the key and the value of KEY=VALUE."""
    key, _, value = text.partition("=")
    if not key or key == text:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected KEY=VALUE, e.g. clip=1.0")
    return key, value


def _target(text: str) -> Path:
    """Return the path of an exported file; its suffix must be known."""
    if Path(text).suffix not in WRITERS:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a name that ends in {' or '.join(WRITERS)}")
    return Path(text)


def run_verb(options: argparse.Namespace) -> int:
    """Start a script on N ranks."""
    from mpips.cli.launch import LaunchCommand, foresee, launch_command, run_again
    from mpips.cli.screen import view

    if options.size is None:
        raise UsageError("argument -n: nothing given, expected the number of ranks, at least 1")
    if not options.script or not Path(options.script[0]).is_file():
        given = repr(options.script[0]) if options.script else "nothing"
        raise UsageError(f"script: {given} given, expected a Python file that exists, after the flags of run")
    settings = dict(options.set) | ({"print_config": "true"} if options.print_config else {})
    config = foresee(settings, options.script, options.mpi_args)
    tolerant = options.ft or config.min_workers > 0

    def command(given: Mapping[str, str], timeout: int | None) -> LaunchCommand:
        return launch_command(
            options.size, options.script, mpi_args=options.mpi_args, timeout=timeout, settings=given, tolerant=tolerant
        )

    try:
        launch = command(settings, options.timeout)
    except (FileNotFoundError, LookupError) as error:
        raise UsageError(str(error)) from error
    if options.dry_run:
        stdout.write(json.dumps(asdict(launch)) if options.json else str(launch))
        return 0
    emit(2, f"{launch.shown()}\n")
    for warning in launch.warnings:
        emit(2, f"mpips: warning: {warning}\n")
    outcome = run_again(command, settings, view(json_wanted=options.json), retries=options.retries, timeout=options.timeout)
    if options.json:
        stdout.write(json.dumps(asdict(outcome)))
    return outcome.exit


def inspect_verb(options: argparse.Namespace) -> int:
    """Show the contents of a checkpoint."""
    path, tree = _load(options.file)
    leaves = [leaf for leaf in _group(tree, "parameters").values() if hasattr(leaf, "shape")]
    counted = {id(leaf): math.prod(leaf.shape) for leaf in leaves}  # tied parameters count once
    facts = {"file": str(path), "bytes": path.stat().st_size, "sha256": "verified"}
    facts |= {name: tree.get(name) for name in ("round", "version", "epoch")}
    facts["parameters"] = sum(counted.values())
    if options.json:
        stdout.write(json.dumps({**facts, "tree": _described(tree)}, default=str))
        return 0
    lines = [f"{name:11}{value:,}" if isinstance(value, int) else f"{name:11}{value}" for name, value in facts.items()]
    stdout.write("\n".join([*lines, *_outline(tree)]))
    return 0


def verify_verb(options: argparse.Namespace) -> int:
    """Say which checkpoints are whole; return 0 if there is one and all are."""
    from mpips.cli import verify

    given: Path = options.run
    if not given.exists():
        raise UsageError(f"RUN: {str(given)!r} given, expected a run folder or a checkpoint that exists")
    found = []
    for one in verify.verdicts(given):  # a large one takes a while: each line as soon as it is known
        found.append(one)
        if not options.json:
            of = f"round {one.round:,}, {one.bytes:,} bytes" if one.round is not None else f"{one.bytes:,} bytes"
            stdout.write(f"{one.path.name}  {'not to be used: ' + one.why if one.why else 'whole'}  ({of})")
    resume = verify.resumed_from(given, found)
    if options.json:
        stdout.write(json.dumps({"checkpoints": [asdict(one) for one in found], "resume": resume}, default=str))
    else:
        stdout.write(resume)
    return 0 if found and not any(one.why for one in found) else 1


def _described(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with each tensor replaced by its shape, dtype and bytes."""
    return {name: _described(leaf) if isinstance(leaf, Mapping)
            else {"shape": list(leaf.shape), "dtype": _dtype(leaf), "bytes": leaf.nbytes} if hasattr(leaf, "shape")
            else leaf for name, leaf in tree.items()}  # fmt: skip


def _group(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a group of the tree; an empty one where it has none of this name."""
    found = tree.get(name)
    return found if isinstance(found, Mapping) else {}


def _shown(name: str) -> str:
    """Return a name as it may be printed: a terminal obeys what a hostile file may have in it."""
    return name if name.isprintable() else repr(name)


def _outline(tree: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    """Yield one line for each group, tensor and value of the tree."""
    for key, leaf in tree.items():
        name = _shown(key)
        if isinstance(leaf, Mapping):
            yield f"{indent}{name}/"
            yield from _outline(leaf, indent + "  ")
        elif hasattr(leaf, "shape"):
            yield f"{indent}{name:32} {tuple(leaf.shape)!s:16} {_dtype(leaf):9} {leaf.nbytes:,} bytes"
        else:
            text = repr(leaf)
            yield f"{indent}{name} = {text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + '...'}"


def _dtype(leaf: Any) -> str:
    """Return the name of a tensor's dtype."""
    return str(leaf.dtype).removeprefix("torch.")


def _load(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint's path and contents; for a run folder, those of its newest valid checkpoint."""
    from mpips import checkpoint

    if not path.exists():
        raise UsageError(f"FILE: {str(path)!r} given, expected a checkpoint or a run folder that exists")
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always")
        found = (checkpoint.newest(path / "checkpoints") or checkpoint.newest(path)) if path.is_dir() else path
    for warning in passed_over:
        emit(2, f"mpips: warning: {warning.message}\n")
    if found is None:
        raise VerbError(f"{path}: no whole checkpoint in it; give a run folder that has checkpoints/*.h5")
    try:
        return found, checkpoint.load(found)
    except checkpoint.CheckpointError as error:
        raise VerbError(str(error)) from error


def export_verb(options: argparse.Namespace) -> int:
    """Write the model of a checkpoint as a state dict."""
    path, tree = _load(options.file)
    if not _group(tree, "parameters"):
        raise VerbError(
            f"{path}: holds no parameters, only {', '.join(map(_shown, tree)) or 'nothing'}; give a run's checkpoint"
        )
    state = _state_dict(tree)
    target: Path = options.to
    if not target.absolute().parent.is_dir():
        raise UsageError(f"argument --to: {str(target)!r} given, expected a name in a folder that exists")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        WRITERS[target.suffix](state, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except RuntimeError as error:  # raised by torch on a full disk
        raise VerbError(f"{target}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    facts = {"file": str(path), "to": str(target), "tensors": len(state), "bytes": target.stat().st_size}
    stdout.write(
        json.dumps(facts) if options.json else f"{target}: {len(state)} tensors, {facts['bytes']:,} bytes, from {path}"
    )
    return 0


def _state_dict(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return parameters and buffers under the names that `load_state_dict` expects. Tied parameters stay one tensor."""
    import torch

    named = {**_group(tree, "parameters"), **_group(tree, "buffers")}
    return {name: torch.as_tensor(leaf) for name, leaf in named.items()}


def _write_pt(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict by `torch.save`."""
    import torch

    torch.save(state, path)


def _write_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise VerbError('export to .safetensors needs a package: pip install "mpips[export]"') from error
    # The format cannot share memory between tensors: each name of a tied parameter gets its own copy.
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)


WRITERS = {".pt": _write_pt, ".safetensors": _write_safetensors}


def env_verb(options: argparse.Namespace) -> int:
    """Describe this machine."""
    from mpips.process.environment import report

    facts = report()
    stdout.write(json.dumps(facts) if options.json else "\n".join(_listing(facts)))
    return 0


def bench_verb(options: argparse.Namespace) -> int:
    """Run a benchmark and show the results."""
    from mpips.cli.bench.error import BenchError
    from mpips.cli.bench.session import bench

    try:
        return bench(options)
    except BenchError as error:
        raise (UsageError if error.status == UsageError.status else VerbError)(str(error)) from error


def plan_verb(options: argparse.Namespace) -> int:
    """Predict memory, traffic and time of a round."""
    if options.nodes * options.ranks_per_node > MOST_RANKS:
        given = f"{options.nodes} x {options.ranks_per_node}"
        raise UsageError(f"arguments --nodes, --ranks-per-node: {given} given, expected at most {MOST_RANKS:,} ranks")
    from mpips.cli import plan

    job = plan.Job.of(
        options.nodes,
        options.ranks_per_node,
        1e6 * options.model_mb,
        plan=options.plan,
        comm_dtype=options.comm_dtype,
        bucket=round(1e6 * options.bucket_cap_mb),
        state=options.optimizer_floats,
    )
    machine = plan.Machine(
        link=options.gbit * 1e9 / 8,
        latency=1e-6 * options.latency_us,
        message=1e-6 * options.message_us,
        memory=1e9 * options.memory_gbs,
    )
    found = plan.predict(job, machine)
    stdout.write(json.dumps(plan.facts(job, machine, found)) if options.json else plan.table(job, machine, found))
    return 0


def _listing(facts: Mapping[str, object], indent: str = "") -> Iterator[str]:
    """Yield lines `name: value`, with groups indented."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:{'' if value else ' -'}"
            yield from _listing(value, indent + "  ")
        else:
            yield f"{indent}{name}: {'-' if value is None else value}"


if __name__ == "__main__":
    sys.exit(main())
