"""Torch's clipping functions on a run's gradients: they must see the average of all workers' gradients.

`clip_grad_norm_`, `clip_grad_value_` and their parts first measure or group the gradients that they are given. The two
functions that they call for that are replaced here by ones that average the gradients before, however the script has imported
the clipping functions.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad

from mpips.model.flat import Flat

GROUP, NORM = "_group_tensors_by_device_and_dtype", "_get_total_norm"
_group: Callable[..., Any] = getattr(clip_grad, GROUP)
_norm: Callable[..., Any] = getattr(clip_grad, NORM)
_runs: weakref.WeakKeyDictionary[Flat, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()


def watch(flat: Flat, average: Callable[[], None]) -> None:
    """Call the method `average` whenever torch is about to clip gradients that lie in `flat`."""
    _runs[flat] = weakref.WeakMethod(average)
    setattr(clip_grad, GROUP, _grouped)
    setattr(clip_grad, NORM, _measured)


def unwatch(flat: Flat) -> None:
    """Stop watching these gradients."""
    _runs.pop(flat, None)


def _measured(tensors: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Average watched gradients over the workers, then return their norm as torch does."""
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return _norm(given + _averaged(given), *args, **kwargs)


def _grouped(tensorlists: list[list[Tensor]], *args: Any, **kwargs: Any) -> Any:
    """Average watched gradients over the workers, then group them as torch does."""
    if not _is_measured():
        tensorlists[0] += _averaged(tensorlists[0])
    return _group(tensorlists, *args, **kwargs) if tensorlists[0] else {}  # torch would fail without any gradient


def _averaged(given: list[Tensor]) -> list[Tensor]:
    """Average watched gradients over the workers.

    Args:
        given: the gradients that the script clips or measures. One that it has assigned to `p.grad` is replaced by what is
            there instead.

    Returns:
        The gradients that belong to them and were None on this worker: only other workers had them.

    Raises:
        RuntimeError: it cannot be known which belong to them.
    """
    parameters, more = _parameters(), list[Tensor]()
    for flat, method in list(_runs.items()):
        average = method()
        if average:
            flat.bring(given)
        ours = any(map(flat.holds, given)) if given else any(map(flat.trains, parameters or ()))
        if average and ours:
            flat.check_spent(flat.numbers(given))
            before = {id(gradient) for gradient in flat.gradients()}
            average()
            found = [gradient for gradient in flat.gradients() if id(gradient) not in before]
            more += _meant(found, parameters, {id(gradient) for gradient in given} >= before)
    return more


def _meant(found: list[Tensor], parameters: Sequence[Tensor] | None, whole: bool) -> list[Tensor]:
    """Return those of the gradients that belong to the parameters that the script clips.

    Args:
        found: the gradients.
        parameters: the parameters; None if they are not known.
        whole: whether the script has given all other gradients of the run.
    """
    if parameters is not None:
        own = {id(p.grad) for p in parameters}
        return [gradient for gradient in found if id(gradient) in own]
    if whole or not found:
        return found
    raise RuntimeError(
        "the clipping or norm of some gradients, where other workers have gradients that are None on this one: given tensors "
        "or a generator, which do not tell whether those belong to it; expected a list of parameters (clip_grad_norm_, "
        "clip_grad_value_), or ps.average() before it"
    )


def _is_measured() -> bool:
    """Return whether torch groups within a function that has averaged by `_measured`: a call of the script's counts once.

    A resumed run counts calls, and averages nothing in those that are done.
    """
    return any(frame.f_code.co_name in ("_measured", "clip_grad_norm_") for frame in _frames())


def _parameters() -> Sequence[Tensor] | None:
    """Return the parameters that the calling function of torch's was given; None if they cannot be known."""
    for frame in _frames():
        if frame.f_globals is not globals() and isinstance(found := frame.f_locals.get("parameters"), (list, tuple)):
            return found
    return None


def _frames() -> Iterator[FrameType]:
    """Yield the frames of torch's functions, and of this module's, that lead from the script to here."""
    frame: FrameType | None = sys._getframe(1)
    while frame and (frame.f_globals is globals() or frame.f_globals.get("__name__", "").startswith("torch.")):
        yield frame
        frame = frame.f_back
