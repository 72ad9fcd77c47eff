"""Checkpoints: a tree of tensors and plain values in one self-describing HDF5 file, which is either whole or absent.

A checkpoint appears under its name only after its bytes and its SHA-256 are on the disk. libhdf5 writes checkpoints but never
reads them. `load` returns what `save` was given, bit for bit.

    background  Writer: a run's checkpoints, written on a thread while training goes on
    folder      save, listed, newest, set_newer_aside: names, the order of the durable steps, pruning
    sidecar     the SHA-256 beside each checkpoint, in sha256sum's format
    latch       the file object that libhdf5 writes through; without it a full disk would crash libhdf5
    snapshot    tree -> index and datasets, which may be copied, so that the tree may change
    writer      snapshot -> HDF5
    reader      HDF5 -> tree, by the index; refuses what the writer does not write
    saved       the dict that `load` returns; it names the key that it lacks
    layout      what writer and reader must agree on: keys, dtypes, the index and the footer
    text        values other than tensors, as JSON

A folder allows one save at a time, and any number of readers.
"""

from mpips.checkpoint.background import Writer, Written, stop_writing
from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.folder import listed, newest, save, set_newer_aside
from mpips.checkpoint.layout import Leaf, Parts, Tree, joined
from mpips.checkpoint.reader import load
from mpips.checkpoint.saved import Saved

__all__ = [
    "CheckpointError",
    "Leaf",
    "Parts",
    "Saved",
    "Tree",
    "Writer",
    "Written",
    "joined",
    "listed",
    "load",
    "newest",
    "save",
    "set_newer_aside",
    "stop_writing",
]
