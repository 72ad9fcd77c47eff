"""Data: what a script gives, each worker's share of it, and its place in it."""

from mpips.data.place import Place, left
from mpips.data.shard import Shard
from mpips.data.source import as_dataset, is_map, samples_in

__all__ = ["Place", "Shard", "as_dataset", "is_map", "left", "samples_in"]
