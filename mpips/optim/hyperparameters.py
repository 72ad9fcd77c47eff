"""The hyperparameters of an optimizer in a message: the numbers of its parameter groups, without rounding.

What a script or its scheduler sets in `param_groups` travels to the server in the push message. Each number is a float64,
encoded as four 16-bit limbs, which a message of any dtype holds exactly. Integers are encoded in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from operator import itemgetter
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

LIMBS = 4  # of 16 bits
UNUSED = {"differentiable"}  # torch adds this key to an optimizer that has loaded a state

Limbs = Any  # (LIMBS * n,) array of uint16


def keys(optimizer: Optimizer) -> list[str]:
    """Return the sorted names of the optimizer's hyperparameters."""
    return sorted(optimizer.defaults.keys() - UNUSED)


def read(optimizer: Optimizer) -> list[float]:
    """Return every number in the parameter groups, NaN in place of values that are no numbers.

    The length is the same on every rank with the same optimizer.
    """
    known = keys(optimizer)
    return [number for group in optimizer.param_groups for key in known for number in numbers_in(group.get(key))]


def names(optimizer: Optimizer) -> list[str]:
    """Return a readable name for each number of `read`, such as `param_groups[0]['lr']`."""
    return [
        f"param_groups[{at}][{key!r}]"
        for at, group in enumerate(optimizer.param_groups)
        for key in keys(optimizer)
        for _ in numbers_in(group.get(key))
    ]


def terms(optimizer: Optimizer) -> list[str]:
    """Return the contract's lines on the optimizer: its class, and the name of each number of `read`."""
    return [f"optimizer = {type(optimizer).__name__}", *(f"hyperparameter {name}" for name in names(optimizer))]


def write(optimizer: Optimizer, numbers: Sequence[float], before: Sequence[float] = ()) -> None:
    """Set the hyperparameters to numbers that `read` returned on another rank. Each keeps the type that it has here.

    Args:
        optimizer: the optimizer.
        numbers: the numbers.
        before: what was written last. What has not changed since is not written: the optimizer may have changed its own.
    """
    rest, last = iter(numbers), iter(before or [float("nan")] * len(numbers))
    for group in optimizer.param_groups:
        for key in keys(optimizer):
            own = numbers_in(group.get(key))
            new, old = [next(rest) for _ in own], [next(last) for _ in own]
            if new not in (own, old) and not any(n != n for n in new):
                group[key] = like(group[key], new)


class Told:
    """An optimizer's numbers, encoded again only when a hyperparameter has changed.

    Attributes:
        numbers: what `read` returns.
        before: `numbers` before they changed last.
        limbs: the same numbers, encoded.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self._names = optimizer, keys(optimizer)
        self._get = itemgetter(*self._names) if len(self._names) > 1 else lambda group: tuple(map(group.get, self._names))
        self._seen: list[Any] = []
        self._in_place = False  # whether a value is a tensor or array, which may change in place
        self.numbers: list[float] = []
        self.before: list[float] = []
        self.limbs: Limbs = None
        self.changed()

    def changed(self) -> bool:
        """Read the hyperparameters again; return whether any number differs from before."""
        try:
            now = list(map(self._get, self.optimizer.param_groups))
        except KeyError:  # a group that lacks one
            now = [tuple(map(group.get, self._names)) for group in self.optimizer.param_groups]
        if not self._in_place and now == self._seen:
            return False
        values = [value for group in now for value in group]
        self._seen, self._in_place = now, any(isinstance(value, (Tensor, np.ndarray)) for value in values)
        numbers = [number for value in values for number in numbers_in(value)]
        limbs = encode(numbers)
        if self.limbs is not None and np.array_equal(limbs, self.limbs):
            return False
        self.before, self.numbers, self.limbs = self.numbers, numbers, limbs
        return True


def encode(numbers: Sequence[float]) -> Limbs:
    """Return the numbers as 16-bit limbs, four each."""
    return np.array(numbers, dtype=np.float64).view(np.uint16)


def decode(limbs: Limbs) -> list[float]:
    """Return the numbers, given their limbs as an array of a message's dtype."""
    numbers: list[float] = limbs.astype(np.uint16).view(np.float64).tolist()
    return numbers


def numbers_in(value: Any) -> list[float]:
    """Return the numbers in one hyperparameter's value: several for a tuple, NaN for a text or None."""
    if isinstance(value, (tuple, list)):
        return [number for one in value for number in numbers_in(one)]
    if isinstance(value, (Tensor, np.ndarray)):
        return [float(value)] if value.size == 1 or (isinstance(value, Tensor) and value.numel() == 1) else [float("nan")]
    if isinstance(value, (Number, np.generic)) and not isinstance(value, (complex, np.complexfloating)):
        return [float(value)]  # type: ignore[arg-type]
    return [float("nan")]


def like(own: Any, new: list[float]) -> Any:
    """Return `new` in the type of `own`: a tensor is filled in place, an int may become a float, as from lr=1 to 0.5."""
    if isinstance(own, (tuple, list)):
        rest = iter(new)
        return type(own)(like(o, [next(rest) for _ in numbers_in(o)]) for o in own)
    if isinstance(own, Tensor):
        return own.fill_(new[0])
    if isinstance(own, (bool, np.generic)):  # keep numpy's type, which sets the precision of later arithmetic
        return type(own)(new[0])
    return int(new[0]) if isinstance(own, int) and new[0].is_integer() else new[0]
