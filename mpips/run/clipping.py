"""Torch's clipping functions on a run's gradients: they must see the average of all workers' gradients.

`clip_grad_norm_`, `clip_grad_value_` and their parts first group the gradients that they are given. The grouping function that
they call is replaced here by one that averages the gradients before, however the script has imported the clipping functions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad

from mpips.model.flat import Flat

NAME = "_group_tensors_by_device_and_dtype"
_group: Callable[..., Any] = getattr(clip_grad, NAME)
_runs: weakref.WeakKeyDictionary[Flat, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()


def watch(flat: Flat, average: Callable[[], None]) -> None:
    """Call the method `average` whenever torch is about to clip gradients that lie in `flat`."""
    _runs[flat] = weakref.WeakMethod(average)
    setattr(clip_grad, NAME, _grouped)


def unwatch(flat: Flat) -> None:
    """Stop watching these gradients."""
    _runs.pop(flat, None)


def _grouped(tensorlists: list[list[Tensor]], *args: Any, **kwargs: Any) -> Any:
    """Average watched gradients over the workers, then group them as torch does."""
    for flat, method in list(_runs.items()):
        average = method()
        if average and any(flat.holds(gradient) for gradient in tensorlists[0]):
            before = {id(gradient) for gradient in flat.gradients()}
            average()
            tensorlists[0] += [
                gradient for gradient in flat.gradients() if id(gradient) not in before
            ]  # only other workers had these
    return _group(tensorlists, *args, **kwargs)
