"""A tree of tensors and plain values in one self-describing HDF5 file, whole or not there at all.

A checkpoint is visible under its name only once its bytes and its SHA-256 are on the disk. libhdf5 writes it and never reads
one. What `load` returns is what `save` was given, bit for bit.

    folder   save, newest, set_newer_aside: names, order of the durable steps, pruning
    sidecar  the SHA-256 beside each checkpoint, in sha256sum's format
    latch    the file libhdf5 writes through; a full disk would crash it otherwise
    writer   tree -> HDF5
    reader   HDF5 -> tree, by the index; refuses what no writer writes
    saved    what `load` returns: it names what it lacks
    layout   what both must agree on: keys, dtypes, the index and the footer
    text     what is no tensor as JSON

One save at a time per folder; any number of readers.
"""

from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.folder import newest, save, set_newer_aside
from mpips.checkpoint.layout import Leaf, Tree
from mpips.checkpoint.reader import load
from mpips.checkpoint.saved import Saved

__all__ = ["CheckpointError", "Leaf", "Saved", "Tree", "load", "newest", "save", "set_newer_aside"]
