"""The file format, which writer and reader must agree on: keys, kinds of leaf, dtypes, the index and the footer.

`unpack(kind, dtype, on_host(values))` is the leaf that `pack` was given. The array between the two has native HDF5 numbers, so
any HDF5 tool can read it. Where HDF5 lacks the number type, the array holds the bits, and the tensor's dtype says what they
mean.

| in the tree                     | in the file                                                                          |
|---------------------------------|--------------------------------------------------------------------------------------|
| dict                            | object of the index; also a group, if a tensor in it has a dataset of its own        |
| tensor, ndarray, `Parts`        | contiguous dataset at its path; with the attribute `dtype` if that is in `BITS`       |
| smaller than `SMALL` bytes      | a part of `/packed/<dtype>.<number>`, unless it is one of the `NAMED` by name        |
| a tensor a second time          | hard link to the first dataset                                                       |
| everything else                 | in the index, see `text`                                                             |

The index is the tree as JSON, in the dataset `/index`. A tensor in it is `{"$tensor": [dtype, shape, dataset, first element in
the dataset, first byte in the file]}`, an array `{"$array": [...]}`. Numbers are little-endian unless an array's dtype says
otherwise. The footer, at the end of the file and behind everything that HDF5 knows of, gives the index's position. So a
checkpoint is read without libhdf5, which a malicious file could crash or send into an endless loop.

In the path of a dataset a key's "/" is written %2F, since HDF5 would make groups of it, and therefore "%" is written %25.
"""

import struct
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Values: TypeAlias = "torch.Tensor | Array"  # of native numbers
Leaf: TypeAlias = "torch.Tensor | Array | Parts | int | float | bool | str | list[Any] | tuple[Any, ...] | None"
# dict[str, Tree | Leaf], but such a union would need a cast at every level of indexing.
Tree: TypeAlias = dict[str, Any]

FORMAT, VERSION = "mpips-checkpoint", 3  # attributes of the root, and in the footer
INDEX, PACKED = "index", "packed"  # names in the root that the tree's keys cannot have
FOOTER = struct.Struct("<QQI16s")  # offset and bytes of the index, version, format
BY_NAME = ("parameters", "buffers", "kept")  # a user who browses these with h5py must find small tensors, too
NAMED = 1 << 12  # the small tensors, the first of those groups, that have datasets of their own: each takes 0.1 ms to create
SMALL = 1 << 16  # bytes; a smaller dataset takes longer to create than to write
TENSOR, ARRAY = "$tensor", "$array"
DATASET, FIRST, AT = 2, 3, 4  # positions in a leaf's entry of the index
DEEPEST = 100  # levels of nested dicts; a cyclic tree is refused there

NATIVE = frozenset(["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
_NAMES = {np.dtype(name).newbyteorder("<"): name for name in NATIVE}  # numpy computes a dtype's name anew each time
BITS = {"bool": "uint8", "bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


@dataclass(frozen=True)
class Parts:
    """A tensor whose elements lie in several pieces of memory. It is stored, and loaded, as one tensor.

    Attributes:
        pieces: the elements in C order, as tensors of one dimension and one dtype, on the host.
        shape: the whole tensor's shape.
    """

    pieces: "tuple[torch.Tensor, ...]"
    shape: "tuple[int, ...]"

    def whole(self) -> torch.Tensor:
        """Return the tensor, copied."""
        return torch.cat(self.pieces).view(self.shape)


def joined(tree: Tree) -> Tree:
    """Return a tree in which each `Parts` is a tensor."""
    found: Tree = {}
    for key, value in tree.items():
        found[key] = joined(value) if isinstance(value, dict) else value.whole() if isinstance(value, Parts) else value
    return found


def check_key(key: object, where: str) -> str:
    """Return `key` if it can name an HDF5 object; otherwise raise ValueError."""
    if not isinstance(key, str):
        raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}; keys must be str, such as {str(key)!r}")
    if key in ("", ".") or "\0" in key or not _is_text(key):
        raise ValueError(f"{where}: key {key!r} must be non-empty text, not '.', without NUL; rename it")
    return str(key)


def escaped(key: str) -> str:
    """Return the name in the file for a key of the tree."""
    return key.replace("%", "%25").replace("/", "%2F")


def _is_text(value: str) -> bool:
    """Return whether `value` can be encoded as UTF-8: it has no lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def pack(leaf: "torch.Tensor | Array", where: str) -> "tuple[str, str, Values]":
    """Return the leaf's kind, its dtype, and its values, or its bits if the dtype is in `BITS`."""
    if isinstance(leaf, torch.Tensor):
        return TENSOR, *_pack_tensor(leaf, where)
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{where}: a masked array would lose its mask; store .data and .mask")
    if leaf.dtype == np.bool_:
        return ARRAY, "bool", leaf.view(np.uint8)
    if leaf.dtype in _NAMES:
        return ARRAY, _NAMES[leaf.dtype], leaf
    if leaf.dtype.name not in NATIVE:
        raise _no_such_number(leaf.dtype, where)
    return ARRAY, leaf.dtype.str, leaf


def _pack_tensor(tensor: torch.Tensor, where: str) -> "tuple[str, Values]":
    """Return a tensor's dtype, and its values or bits: an array, or a tensor if they are on a GPU."""
    name = _name(tensor.dtype)
    if name not in NATIVE and name not in BITS:
        raise _no_such_number(tensor.dtype, where)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{where}: a {tensor.layout} tensor on {tensor.device} has no dense values; call .to_dense()")
    bits = tensor.detach() if name in NATIVE else tensor.detach().view(getattr(torch, BITS[name]))
    return name, on_host(bits) if bits.device.type == "cpu" else bits


@cache
def _name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def on_host(values: "Values") -> Array:
    """Return values as an array, without a copy if they are on the host."""
    if not isinstance(values, torch.Tensor):
        return values
    array = values.numpy(force=True)
    return array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("<"))


def _no_such_number(dtype: object, where: str) -> TypeError:
    """Return the error for a dtype that cannot be stored."""
    return TypeError(f"{where}: cannot store {dtype}; expected one of {sorted(NATIVE | BITS.keys())}; convert it first")


def stored(kind: str, dtype: object) -> "np.dtype[Any]":
    """Return the array dtype in which a leaf of this kind and dtype is stored; raise ValueError if there is none."""
    if isinstance(dtype, str):
        if dtype in NATIVE or (dtype in BITS and (kind == TENSOR or dtype == "bool")):
            little: np.dtype[Any] = np.dtype(BITS.get(dtype, dtype)).newbyteorder("<")
            return little
        if kind == ARRAY and dtype.startswith(">") and np.dtype(dtype).name in NATIVE:
            return np.dtype(dtype)
    raise ValueError(f"dtype {dtype!r}, expected one of {sorted(NATIVE | BITS.keys())}")


def unpack(kind: str, dtype: str, array: Array) -> "torch.Tensor | Array":
    """Return the leaf that `pack` was given; raise ValueError if no leaf packs to this."""
    if dtype == "bool" and array.size and array.max() > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    if kind == ARRAY:
        return array.view(np.bool_) if dtype == "bool" else array
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    return tensor.view(getattr(torch, dtype)) if dtype in BITS else tensor
