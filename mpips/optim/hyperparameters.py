"""An optimizer's hyperparameters on their way: the numbers of its parameter groups, exact in any message.

What a script or its scheduler sets in `param_groups` goes to the server with the push. A number is a float64, which travels as
four limbs of 16 bits, as integers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

LIMBS = 4  # of 16 bits
UNUSED = {"differentiable"}  # torch adds it to an optimizer that has been put back

Limbs = Any  # (LIMBS * n,) array of uint16


def keys(optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's hyperparameters."""
    return sorted(optimizer.defaults.keys() - UNUSED)


def read(optimizer: Optimizer) -> list[float]:
    """Every number of the groups, NaN for what is none: as long on every rank with the same optimizer."""
    known = keys(optimizer)
    return [number for group in optimizer.param_groups for key in known for number in numbers_in(group.get(key))]


def names(optimizer: Optimizer) -> list[str]:
    """What each number of `read` is, for people."""
    return [
        f"param_groups[{at}][{key!r}]"
        for at, group in enumerate(optimizer.param_groups)
        for key in keys(optimizer)
        for _ in numbers_in(group.get(key))
    ]


def terms(optimizer: Optimizer) -> list[str]:
    """For the contract: whose numbers `read` gives."""
    return [f"optimizer = {type(optimizer).__name__}", *(f"hyperparameter {name}" for name in names(optimizer))]


def write(optimizer: Optimizer, numbers: Sequence[float]) -> None:
    """Take over what `read` gave elsewhere; each keeps the type that it has here."""
    rest = iter(numbers)
    for group in optimizer.param_groups:
        for key in keys(optimizer):
            own = numbers_in(group.get(key))
            new = [next(rest) for _ in own]
            if new != own and not any(n != n for n in new):
                group[key] = like(group[key], new)


class Told:
    """What an optimizer's numbers are, read anew only when something has changed.

    Attributes:
        numbers: as `read` gives them.
        limbs: the same, encoded.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self._names = optimizer, keys(optimizer)
        self._seen: list[Any] = []
        self._in_place = False  # whether a value may change without another in its place
        self.numbers: list[float] = []
        self.limbs: Limbs = None
        self.changed()

    def changed(self) -> bool:
        """Look again; whether there are other numbers than before."""
        now = [group.get(name) for group in self.optimizer.param_groups for name in self._names]
        if not self._in_place and now == self._seen:
            return False
        self._seen, self._in_place = now, any(isinstance(value, (Tensor, np.ndarray)) for value in now)
        numbers = [number for value in now for number in numbers_in(value)]
        limbs = encode(numbers)
        if self.limbs is not None and np.array_equal(limbs, self.limbs):
            return False
        self.numbers, self.limbs = numbers, limbs
        return True


def encode(numbers: Sequence[float]) -> Limbs:
    """As limbs."""
    return np.array(numbers, dtype=np.float64).view(np.uint16)


def decode(limbs: Limbs) -> list[float]:
    """The numbers, of limbs in a message's dtype."""
    numbers: list[float] = limbs.astype(np.uint16).view(np.float64).tolist()
    return numbers


def numbers_in(value: Any) -> list[float]:
    """The numbers of one hyperparameter: of a tuple several, NaN for a text or None."""
    if isinstance(value, (tuple, list)):
        return [number for one in value for number in numbers_in(one)]
    if isinstance(value, (Tensor, np.ndarray)):
        return [float(value)] if value.size == 1 or (isinstance(value, Tensor) and value.numel() == 1) else [float("nan")]
    if isinstance(value, (Number, np.generic)) and not isinstance(value, (complex, np.complexfloating)):
        return [float(value)]  # type: ignore[arg-type]
    return [float("nan")]


def like(own: Any, new: list[float]) -> Any:
    """The same numbers, of the kind that is here; where a script began with lr=1, 0.5 may follow."""
    if isinstance(own, (tuple, list)):
        rest = iter(new)
        return type(own)(like(o, [next(rest) for _ in numbers_in(o)]) for o in own)
    if isinstance(own, Tensor):
        return own.fill_(new[0])
    if isinstance(own, (bool, np.generic)):  # numpy's own numbers are computed with at their own precision
        return type(own)(new[0])
    return int(new[0]) if isinstance(own, int) and new[0].is_integer() else new[0]
