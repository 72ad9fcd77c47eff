"""What mpips is compared with: Python files with one function for each benchmark that they take part in.

    make_round(comm, weights, optimizer)  round, small, scaling: returns a function that runs one round
    wrap(comm, model)                     train: returns a model whose backward averages the gradients of all ranks
    save(tensors, file)                   checkpoint: writes the tensors into a file that is open

`weights` is one flat parameter. Before a round its `grad` holds this rank's gradients. After the round its values, on every
rank, are those that the optimizer gives with the mean of all gradients. A file's name without `.py` is the opponent's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import mpips
from mpips.cli.bench.case import BOUNDS
from mpips.cli.bench.error import BenchError
from mpips.cli.bench.gradient import Gradient
from mpips.cli.bench.own import MakeStep

if TYPE_CHECKING:
    from mpi4py import MPI

FOLDER = Path(mpips.__file__).parent.parent / "benchmarks" / "opponents"  # in a source tree; not where a wheel is installed
DEFAULT = ("raw_mpi.py", "ddp_gloo.py", "torch_save.py")
TAKEN = ("mpips", "plain", "plain_threads", *BOUNDS)
Functions = dict[str, Callable[..., Any]]


def opponents(against: Sequence[Path] | None, function: str) -> Functions:
    """Return the function of that name of each opponent, by the opponent's name.

    Args:
        against: the opponents' files. None: those of the source tree that have the function; none outside of a source tree.
        function: one of the protocol's.

    Raises:
        BenchError: a file cannot be imported, lacks the function, or has a name that is taken.
    """
    if against is None:
        modules = [_imported(FOLDER / name) for name in DEFAULT if (FOLDER / name).is_file()]
        return {module.__name__: getattr(module, function) for module in modules if hasattr(module, function)}
    found: Functions = {}
    for path in against:
        if path.stem in TAKEN or path.stem in found:
            raise BenchError(f"--against: {str(path)!r} given, expected a file of another name: {path.stem} is taken", 2)
        try:
            found[path.stem] = getattr(_imported(path), function)
        except AttributeError:
            raise BenchError(f"--against: {str(path)!r} given, expected a file that defines {function}", 2) from None
    return found


def _imported(path: Path) -> Any:
    """Return the module in a file."""
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BenchError(f"--against: {str(path)!r} given, expected a Python file", 2)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # an opponent's own, whatever it is
        raise BenchError(f"{path}: cannot be imported: {type(error).__name__}: {error}", 2) from error
    return module


class Theirs:
    """A variant that runs an opponent's round.

    Args:
        make_round: the opponent's function.
        comm: all ranks.
        weights: `(numel,)` float32, the initial weights; taken over.
        scratch: `(numel,)` float32, for gradients; others may use it between rounds.
        make: the optimizer.
    """

    alone = False

    def __init__(
        self, make_round: Callable[..., Any], comm: MPI.Comm, weights: Tensor, scratch: Tensor, make: MakeStep
    ) -> None:
        self._gradient, self._scratch = Gradient(comm.rank, [scratch.numel()]), scratch
        parameter = nn.Parameter(weights)
        parameter.grad = scratch
        self.weights = weights
        self.round: Callable[[], None] = make_round(comm, parameter, make([parameter]))

    def fill(self) -> None:
        """Write new gradients."""
        self._gradient.write([self._scratch])
