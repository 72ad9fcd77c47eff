"""Values that HDF5 has no type for, as strict JSON text.

`loads(json.dumps(tagged(value)))` is the value again, including types and bits. What JSON lacks is tagged: `{"$tuple": [...]}`;
`{"$dict": [[key, value], ...]}` for keys other than plain strings; `{"$float": "7ff8000000000000"}` for nan and inf, the bits
of the double; `{"$int": "0x..."}` beyond 64 bits. Any other object with a key that begins with `$` is malformed.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

_INT64 = range(-(2**63), 2**63)

Untag = Mapping[str, Callable[[Any], Any]]


def tagged(value: object) -> object:
    """Return the JSON types for `value`; raise TypeError or ValueError if `value` could not be restored from them."""
    try:
        return _tagged(value)
    except RecursionError as error:
        raise ValueError("a list, tuple or dict contains itself or is nested too deeply to store") from error


def as_object(pairs: Mapping[str, object]) -> object:
    """Return the JSON types for a dict, given those for its values."""
    if any(key.startswith("$") for key in pairs):
        return {"$dict": [[key, item] for key, item in pairs.items()]}
    return pairs


def loads(text: "str | bytes | bytearray", more: Untag | None = None) -> Any:
    """Return the value of the JSON text; raise ValueError if `tagged` produces no such text.

    Args:
        text: JSON.
        more: further tags, each with the function that restores a value from what is tagged.
    """
    untag = {**_UNTAG, **(more or {})}

    def untagged(pairs: list[tuple[str, Any]]) -> Any:
        if not any(key.startswith("$") for key, _ in pairs):
            return _once(pairs)
        ((tag, body),) = pairs  # ValueError for more than one key
        if tag not in untag:
            raise ValueError(f"unknown tag {tag[:40]!r}, expected one of {sorted(untag)}")
        return untag[tag](body)

    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=untagged)
    except (TypeError, struct.error, RecursionError) as error:
        raise ValueError(str(error)) from error


def _tagged(value: object) -> object:
    """Return the JSON types for `value`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if value in _INT64 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [_tagged(item) for item in value]}
    if isinstance(value, dict):
        return _tagged_dict(value)
    raise TypeError(f"cannot store a {type(value).__name__} here; tensors and arrays belong in a dict, not in a list")


def _tagged_dict(value: dict[Any, Any]) -> object:
    """Return the JSON types for a dict."""
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _tagged(item) for key, item in value.items()}
    return {"$dict": [[_tagged(key), _tagged(item)] for key, item in value.items()]}


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs as a dict; raise ValueError for a duplicate key."""
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key has two values")
    return found


_UNTAG: Untag = {
    "$int": lambda body: int(body, 16),
    "$float": lambda body: struct.unpack(">d", bytes.fromhex(body))[0],
    "$tuple": lambda body: tuple(body),
    "$dict": lambda body: _once((key, item) for key, item in body),
}


def _refuse(constant: str) -> Any:
    """Raise ValueError for NaN or Infinity, which strict JSON lacks."""
    raise ValueError(f"{constant} is not JSON")
