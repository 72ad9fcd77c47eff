"""What the writer and the reader must agree on: keys, kinds of leaf, dtypes and the marks in the root.

`unpack(*pack(leaf))` is the leaf again. The array between them is in native HDF5 numbers, so any HDF5 tool can read it;
where HDF5 has no such number the array holds the bits and `dtype` names what they mean.

| in the tree              | in the file                                                        |
|--------------------------|--------------------------------------------------------------------|
| dict                     | group, children in order (attributes first, then links)            |
| tensor, ndarray          | contiguous dataset, attribute `kind`, and `dtype` if it holds bits |
| a tensor a second time   | hard link to the first dataset                                     |
| int, float, bool, str    | attribute of the group                                             |
| None, list, tuple        | attribute `<key>.json`, see `text`                                 |

A key's "/" is written %2F, as HDF5 would make groups of it, and its "%" therefore %25.
"""

from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Leaf: TypeAlias = "torch.Tensor | Array | int | float | bool | str | list[Any] | tuple[Any, ...] | None"
# dict[str, Tree | Leaf]; a union of that depth cannot be indexed without a cast at every level.
Tree: TypeAlias = dict[str, Any]

MARKS = {"format": "mpips-checkpoint", "format_version": 2}  # attributes of the root, no keys of the tree
JSON = ".json"
DEEPEST = 100  # groups within groups; a cycle in the tree or in the file ends here

NATIVE = frozenset(["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
BITS = {"bool": "uint8", "bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def check_key(key: object, where: str) -> str:
    """Return `key` if it can name an HDF5 object; otherwise ValueError."""
    if not isinstance(key, str):
        raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}; keys must be str, such as {str(key)!r}")
    if key in ("", ".") or "\0" in key or not is_text(key):
        raise ValueError(f"{where}: key {key!r} must be non-empty text, not '.', without NUL; rename it")
    return str(key)


def escaped(key: str) -> str:
    """The name in the file of a tree's key."""
    return key.replace("%", "%25").replace("/", "%2F")


def unescaped(name: str) -> str:
    """The tree's key of a name in the file."""
    return name.replace("%2F", "/").replace("%25", "%")


def is_text(value: str) -> bool:
    """Say whether HDF5 can hold `value` as it is: UTF-8, which has no lone surrogates, ended by a NUL."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def pack(leaf: "torch.Tensor | Array", where: str) -> tuple[str, str | None, Array]:
    """Return the leaf's kind, the dtype its bits stand for (None: the array's own), and an array on the host."""
    if isinstance(leaf, torch.Tensor):
        return "tensor", *_pack_tensor(leaf, where)
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{where}: a masked array would lose its mask; store .data and .mask")
    if leaf.dtype == np.bool_:
        return "ndarray", "bool", leaf.view(np.uint8)
    if leaf.dtype.name not in NATIVE:
        raise _no_such_number(leaf.dtype, where)
    return "ndarray", None, leaf


def _pack_tensor(tensor: torch.Tensor, where: str) -> tuple[str | None, Array]:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in NATIVE and name not in BITS:
        raise _no_such_number(tensor.dtype, where)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{where}: a {tensor.layout} tensor on {tensor.device} has no dense values; call .to_dense()")
    if name in NATIVE:
        return None, tensor.numpy(force=True)
    return name, tensor.view(getattr(torch, BITS[name])).numpy(force=True)


def _no_such_number(dtype: object, where: str) -> TypeError:
    return TypeError(f"{where}: cannot store {dtype}; expected one of {sorted(NATIVE | BITS.keys())}; convert it first")


def unpack(kind: str, dtype: str | None, array: Array) -> "torch.Tensor | Array":
    """Return the leaf that `pack` was given; ValueError if no leaf packs to this."""
    if dtype is not None and (dtype not in BITS or array.dtype != np.dtype(BITS[dtype])):
        raise ValueError(f"dtype {dtype!r} in {array.dtype}, expected one of {BITS}")
    if dtype == "bool" and array.size and array.max() > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    if kind == "tensor":
        tensor = torch.from_numpy(array)  # ValueError or TypeError for the byte order of another machine
        return tensor if dtype is None else tensor.view(getattr(torch, dtype))
    if kind == "ndarray" and dtype in (None, "bool"):
        return array if dtype is None else array.view(np.bool_)
    raise ValueError(f"kind {kind!r} of dtype {dtype!r}, expected tensor or ndarray")
