"""Data: what a script may give, each worker's share of it, and the worker's place in it."""

from mpips.data.common import Common
from mpips.data.place import Place, left
from mpips.data.share import Share
from mpips.data.source import as_dataset, is_map
from mpips.data.turns import Part

__all__ = ["Common", "Part", "Place", "Share", "as_dataset", "is_map", "left"]
