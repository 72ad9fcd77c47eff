"""The tree that a checkpoint returns; it names the key that it lacks."""

from collections.abc import Mapping
from typing import Any

from mpips.checkpoint.error import CheckpointError


class Saved(dict[str, Any]):
    """A dict that raises CheckpointError, with the key's path, for a missing key.

    Args:
        tree: nested dicts.
        source: the name of the file, for the message.
        place: this dict's path in the tree; "" for the root.
    """

    def __init__(self, tree: Mapping[str, Any], source: str, place: str = "") -> None:
        super().__init__({k: Saved(v, source, f"{place}/{k}") if isinstance(v, dict) else v for k, v in tree.items()})
        self._source, self._place = source, place

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._source}: has no {self._place}/{key}, which every checkpoint has; use another checkpoint")
