"""A tree that comes from a file, which says what it lacks."""

from collections.abc import Mapping
from typing import Any

from mpips.checkpoint.error import CheckpointError


class Saved(dict[str, Any]):
    """A dict of which a key that is not there is a CheckpointError that names it.

    Args:
        tree: nested dicts.
        source: where it comes from, for people.
        place: the path to it in there; "" is the whole.
    """

    def __init__(self, tree: Mapping[str, Any], source: str, place: str = "") -> None:
        super().__init__({k: Saved(v, source, f"{place}/{k}") if isinstance(v, dict) else v for k, v in tree.items()})
        self._source, self._place = source, place

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._source}: has no {self._place}/{key}, which every checkpoint has; use another checkpoint")
