"""Torch's clipping of gradients, where these are a run's: it is to see the gradients of all workers together.

`clip_grad_norm_`, `clip_grad_value_` and their parts group the gradients that they are given first. What they call for that
is replaced by a function that brings the gradients together before, however the script has imported them.
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
    """Call the method `average` before torch clips gradients that lie in `flat`."""
    _runs[flat] = weakref.WeakMethod(average)
    setattr(clip_grad, NAME, _grouped)


def unwatch(flat: Flat) -> None:
    """Leave these gradients alone."""
    _runs.pop(flat, None)


def _grouped(tensorlists: list[list[Tensor]], *given: Any, **named: Any) -> Any:
    for flat, method in list(_runs.items()):
        average = method()
        if average and any(flat.holds(gradient) for gradient in tensorlists[0]):
            before = {id(gradient) for gradient in flat.gradients()}
            average()
            tensorlists[0] += [gradient for gradient in flat.gradients() if id(gradient) not in before]  # of other workers
    return _group(tensorlists, *given, **named)
