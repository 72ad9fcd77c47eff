"""A tree of tensors and plain values in one self-describing HDF5 file, whole or not there at all.

A checkpoint is visible under its name only once its bytes and its SHA-256 are on the disk, and libhdf5 sees only bytes
whose SHA-256 was checked. What `load` returns is what `save` was given, bit for bit.

    folder   save, newest, set_newer_aside: names, order of the durable steps, pruning
    sidecar  the SHA-256 beside each checkpoint, in sha256sum's format
    latch    the file libhdf5 writes through; a full disk would crash it otherwise
    writer   tree -> HDF5
    reader   HDF5 -> tree; refuses all that the writer does not write
    layout   what both must agree on: keys, dtypes, the marks in the root
    text     lists, tuples and None as JSON

One save at a time per folder; any number of readers.
"""

import os

# Read by libhdf5 when h5py is first imported: no filter plugin is ever loaded from a search path into this process.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"

from mpips.checkpoint.error import CheckpointError
from mpips.checkpoint.folder import newest, save, set_newer_aside
from mpips.checkpoint.layout import Leaf, Tree
from mpips.checkpoint.reader import load

__all__ = ["CheckpointError", "Leaf", "Tree", "load", "newest", "save", "set_newer_aside"]
