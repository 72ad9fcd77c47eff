"""What the writer and the reader must agree on: keys, kinds of leaf, dtypes, the index and the footer.

`unpack(*pack(leaf))` is the leaf again. The array between them is in native HDF5 numbers, so any HDF5 tool can read it;
where HDF5 has no such number the array holds the bits and the tensor's dtype names what they mean.

| in the tree                     | in the file                                                                          |
|---------------------------------|--------------------------------------------------------------------------------------|
| dict                            | object of the index; a group, too, where a tensor in it has a dataset of its own      |
| tensor, ndarray                 | contiguous dataset at its path; of 16 bits or a bool, with the attribute `dtype`      |
| of fewer bytes than `SMALL`     | a part of `/packed/<dtype>.<number>`, unless it is below a group of `BY_NAME`         |
| a tensor a second time          | hard link to the first dataset                                                       |
| everything else                 | in the index, see `text`                                                             |

The index is the tree as JSON, in the dataset `/index`. A tensor there is `{"$tensor": [dtype, shape, dataset, first element in
it, first byte in the file]}`, an array `{"$array": [...]}`; numbers are little-endian unless an array's dtype says otherwise.
Where the index lies is said by the footer, behind what HDF5 knows of. So a checkpoint is read without libhdf5, which a file can
crash, or have loop for ever.

A key's "/" is written %2F in the path of a dataset, as HDF5 would make groups of it, and its "%" therefore %25.
"""

import struct
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Leaf: TypeAlias = "torch.Tensor | Array | int | float | bool | str | list[Any] | tuple[Any, ...] | None"
# dict[str, Tree | Leaf]; a union of that depth cannot be indexed without a cast at every level.
Tree: TypeAlias = dict[str, Any]

FORMAT, VERSION = "mpips-checkpoint", 3  # attributes of the root, and in the footer
INDEX, PACKED = "index", "packed"  # of the root, no keys of the tree
FOOTER = struct.Struct("<QQI16s")  # offset and bytes of the index, version, format
BY_NAME = ("parameters", "buffers", "kept")  # who looks at these with h5py shall not miss the small ones
SMALL = 1 << 16  # bytes; below, a dataset takes longer to make than to write
TENSOR, ARRAY = "$tensor", "$array"
DATASET, FIRST, AT = 2, 3, 4  # of a leaf's place in the index
DEEPEST = 100  # dicts within dicts; a cycle in the tree ends here

NATIVE = frozenset(["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
_NAMES = {np.dtype(name).newbyteorder("<"): name for name in NATIVE}  # numpy makes a dtype's name anew each time
BITS = {"bool": "uint8", "bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def check_key(key: object, where: str) -> str:
    """Return `key` if it can name an HDF5 object; otherwise ValueError."""
    if not isinstance(key, str):
        raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}; keys must be str, such as {str(key)!r}")
    if key in ("", ".") or "\0" in key or not _is_text(key):
        raise ValueError(f"{where}: key {key!r} must be non-empty text, not '.', without NUL; rename it")
    return str(key)


def escaped(key: str) -> str:
    """The name in the file of a tree's key."""
    return key.replace("%", "%25").replace("/", "%2F")


def _is_text(value: str) -> bool:
    """Say whether `value` is UTF-8, which has no lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def pack(leaf: "torch.Tensor | Array", where: str) -> tuple[str, str, Array]:
    """Return the leaf's kind, its dtype, and an array on the host of its values or, of a dtype in `BITS`, its bits."""
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


def _pack_tensor(tensor: torch.Tensor, where: str) -> tuple[str, Array]:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in NATIVE and name not in BITS:
        raise _no_such_number(tensor.dtype, where)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{where}: a {tensor.layout} tensor on {tensor.device} has no dense values; call .to_dense()")
    bits = tensor if name in NATIVE else tensor.view(getattr(torch, BITS[name]))
    array = bits.numpy(force=True)
    return name, array.astype(array.dtype.newbyteorder("<"), copy=False)


def _no_such_number(dtype: object, where: str) -> TypeError:
    return TypeError(f"{where}: cannot store {dtype}; expected one of {sorted(NATIVE | BITS.keys())}; convert it first")


def stored(kind: str, dtype: object) -> "np.dtype[Any]":
    """Return the dtype of the array that a leaf of this kind and dtype is in the file; ValueError if there is none."""
    if isinstance(dtype, str):
        if dtype in NATIVE or (dtype in BITS and (kind == TENSOR or dtype == "bool")):
            little: np.dtype[Any] = np.dtype(BITS.get(dtype, dtype)).newbyteorder("<")
            return little
        if kind == ARRAY and dtype.startswith(">") and np.dtype(dtype).name in NATIVE:
            return np.dtype(dtype)
    raise ValueError(f"dtype {dtype!r}, expected one of {sorted(NATIVE | BITS.keys())}")


def unpack(kind: str, dtype: str, array: Array) -> "torch.Tensor | Array":
    """Return the leaf that `pack` was given; ValueError if no leaf packs to this."""
    if dtype == "bool" and array.size and array.max() > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    if kind == ARRAY:
        return array.view(np.bool_) if dtype == "bool" else array
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    return tensor.view(getattr(torch, dtype)) if dtype in BITS else tensor
