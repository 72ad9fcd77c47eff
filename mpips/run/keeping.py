"""What a script keeps in the checkpoint besides the model: averages, teachers, trackers, and torch's schedulers.

The state of each object is stored as a tree of tensors and a text; nothing is pickled. The state is worker 0's, and every
worker loads it on resume.
"""

from __future__ import annotations

import gc
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mpips.optim.foreign import nested
from mpips.optim.snapshot import dtype_of

Tree = dict[str, Any]
OWN, GROUPS = "optimizer ", "param_groups"
_schedulers: WeakSet[LRScheduler] = WeakSet()
PLAIN = (str, int, float, bool, type(None))


def pack(state: Any, name: str) -> Tree:
    """Return a state as a tree: its tensors by path, everything else as JSON.

    Raises:
        TypeError: the state holds something other than tensors, arrays, numbers, texts, and dicts, lists and tuples of these.
    """
    tensors: dict[str, Tensor] = {}
    return {"text": json.dumps(_to_plain(state, "", name, tensors)), "tensors": tensors}


# No nested functions here: a recursive closure is a reference cycle, which would keep the tensors until garbage collection.
def _to_plain(value: Any, place: str, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON's types, with its tensors moved to `tensors` under their paths."""
    if isinstance(value, (Tensor, np.ndarray)):
        tensors[place] = torch.as_tensor(value).detach()
        return {"tensor": place, "array": isinstance(value, np.ndarray)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    under = f"{place}." if place else ""
    if isinstance(value, Mapping):
        items = value.items()
        return {"dict": [[_to_plain(k, place, name, tensors), _to_plain(v, f"{under}{k}", name, tensors)] for k, v in items]}
    if isinstance(value, deque):
        return {"deque": [value.maxlen, _to_plain(list(value), place, name, tensors)]}
    if isinstance(value, (list, tuple, set)):
        kind = type(value).__mro__[-2].__name__
        return {kind: [_to_plain(v, f"{under}{at}", name, tensors) for at, v in enumerate(value)]}
    raise TypeError(
        f"the state of {name} holds a {type(value).__name__} at {place or 'its top'}; a checkpoint holds tensors, arrays, "
        f"numbers, texts, and dicts, lists and tuples of these"
    )


def unpack(tree: Tree) -> Any:
    """Return the state that was given to `pack`."""
    return _from_plain(json.loads(tree["text"]), tree["tensors"])


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `_to_plain` was given."""
    if isinstance(value, dict) and "tensor" in value:
        tensor = tensors[value["tensor"]].clone()
        return tensor.numpy() if value["array"] else tensor
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        if kind == "dict":
            return {_from_plain(k, tensors): _from_plain(v, tensors) for k, v in items}
        if kind == "dtype":
            return dtype_of(items)
        if kind == "deque":
            return deque(_from_plain(items[1], tensors), maxlen=items[0])
        return {"list": list, "tuple": tuple, "set": set}[kind](_from_plain(item, tensors) for item in items)
    return value


def find_schedulers() -> None:
    """Find all schedulers of this process, and note each one that is made from now on.

    An optimizer does not know its schedulers, and some of torch's do not call the constructor of `LRScheduler`, so the new ones
    are noted by `LRScheduler.__new__`.
    """

    def noted(kind: type[LRScheduler], *_: Any, **__: Any) -> LRScheduler:
        scheduler = object.__new__(kind)
        _schedulers.add(scheduler)
        return scheduler

    if LRScheduler.__new__ is not object.__new__:  # done already
        return
    LRScheduler.__new__ = noted  # type: ignore[method-assign, assignment]
    kinds: list[type] = [LRScheduler]
    for kind in kinds:
        kinds += kind.__subclasses__()
    _schedulers.update(thing for thing in gc.get_referrers(*kinds) if issubclass(type(thing), LRScheduler))


def schedulers(optimizer: Optimizer) -> list[LRScheduler]:
    """Return torch's schedulers of this optimizer, except those that are parts of another scheduler."""
    found = [scheduler for scheduler in _schedulers if vars(scheduler).get("optimizer") is optimizer]
    parts = {id(part) for o in found for part in vars(o).get("_schedulers", ())}
    return [o for o in found if id(o) not in parts]


class Stepping:
    """The state of an optimizer that steps on the workers, including the optimizers that it wraps.

    Args:
        optimizer: the script's optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._all = [optimizer, *nested(optimizer).values()]

    def state_dict(self) -> list[Any]:
        """Return the state of each optimizer. Wrapped ones may share the outer optimizer's groups."""
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, states: list[Any]) -> None:
        """Restore what `state_dict` returned."""
        for optimizer, state in zip(self._all, states, strict=True):
            groups = optimizer.param_groups
            optimizer.load_state_dict(state)
            for own, group in zip(
                groups, optimizer.param_groups, strict=True
            ):  # keep the group objects, which others may share
                own.update(group)
            optimizer.param_groups = groups


class Keeping:
    """The objects that a script keeps in the checkpoint.

    Args:
        saved: the objects' states in the checkpoint of a resumed run, by name; empty for a new run.
        optimizers: the script's optimizers. Torch's schedulers of these are kept automatically.
        tell: prints a line.

    Attributes:
        behind: whether `catch_up` is still to be called, once, before the first step.
        own_state: the indices of the optimizers that step on the workers and therefore have their own state.
    """

    def __init__(
        self, saved: Mapping[str, Tree], optimizers: Sequence[Optimizer], tell: Callable[[str], object] = print
    ) -> None:
        find_schedulers()
        self._saved, self._optimizers, self._tell = dict(saved), optimizers, tell
        self._objects: dict[str, Any] = {}
        self._begun: list[tuple[Any, Tree]] = []  # objects with the states that they have got back, until `forget`
        self._groups = unpack(self._saved.pop(GROUPS)) if saved else []
        self.behind, self._resumed = True, bool(saved)
        self._stepping = [Stepping(optimizer) for optimizer in optimizers]
        self.own_state = {which for which in range(len(optimizers)) if f"{OWN}{which}" in self._saved}
        self._put_groups()

    def keep(self, objects: Mapping[str, Any]) -> None:
        """Keep these objects from now on. A resumed run restores the state of each here."""
        for name, thing in objects.items():
            if not all(callable(getattr(thing, call, None)) for call in ("state_dict", "load_state_dict")):
                given = f"given a {type(thing).__name__}"
                raise TypeError(f"ps.keep({name}=...): {given}, expected an object with state_dict and load_state_dict")
            if name not in self._objects:
                self._give_back(name, thing)
            pack(thing.state_dict(), name)  # raises if the state cannot be kept
            self._objects[name] = thing

    def _give_back(self, name: str, thing: Any) -> None:
        """Restore an object's state from the checkpoint; if there is none, say so."""
        if name in self._saved:
            tree = self._saved.pop(name)
            thing.load_state_dict(unpack(tree))
            self._begun.append((thing, tree))
        elif self._resumed:
            self._tell(f"mpips: resume: the checkpoint has no {name!r}: it goes on from what the script has made it")

    def put_back(self) -> None:
        """Restore again what has been restored: the script has executed code again that the checkpoint's run had executed."""
        if self.behind:
            self.catch_up()
        for thing, tree in self._begun:
            thing.load_state_dict(unpack(tree))
        self._put_groups()

    def forget(self) -> None:
        """Forget what `put_back` needs."""
        self._begun = []

    def _put_groups(self) -> None:
        """Restore the hyperparameters in the optimizers' groups."""
        for optimizer, groups in zip(self._optimizers, self._groups, strict=False):
            for group, saved in zip(optimizer.param_groups, groups, strict=False):
                group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})

    def _schedulers(self) -> dict[str, Any]:
        """Return torch's schedulers that the script does not keep itself, by class name.

        Raises:
            TypeError: an optimizer has two schedulers of one class, which a resumed run could not tell apart.
        """
        kept_ids, named = {id(thing) for thing in self._objects.values()}, dict[str, Any]()
        for which, optimizer in enumerate(self._optimizers):
            for scheduler in sorted(schedulers(optimizer), key=lambda one: type(one).__name__):
                name = f"{type(scheduler).__name__} {which}" if which else type(scheduler).__name__
                if id(scheduler) in kept_ids:
                    continue
                if named.setdefault(name, scheduler) is not scheduler:
                    raise TypeError(
                        f"two {type(scheduler).__name__} of one optimizer: a resumed run could not tell them apart; keep them "
                        f"by names, ps.keep(first=..., second=...)"
                    )
        return named

    def catch_up(self) -> None:
        """Before the first step, restore torch's schedulers, including those made since `connect`.

        Raises:
            TypeError: schedulers could not be told apart.
        """
        self.behind, found = False, self._schedulers()
        if not self._resumed:
            return
        for optimizer in self._optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # it was, before the resume
        stepping = {f"{OWN}{which}": self._stepping[which] for which in self.own_state}
        for name, thing in (found | stepping).items():
            self._give_back(name, thing)
        self._put_groups()  # a scheduler made since connect has reset the rates

    def state_dict(self) -> dict[str, Tree]:
        """Return the state of each object by name, and saved states that the script has not restored yet, for a checkpoint."""
        own_groups = [optimizer.param_groups for optimizer in self._optimizers]
        groups = [[{k: v for k, v in group.items() if k != "params"} for group in own] for own in own_groups]
        own = self._schedulers() | {f"{OWN}{which}": self._stepping[which] for which in self.own_state} | self._objects
        saved = self._saved | {GROUPS: pack(groups, "the optimizer's param_groups")}
        return saved | {name: pack(thing.state_dict(), name) for name, thing in own.items()}
