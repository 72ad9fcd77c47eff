"""Values that HDF5 has no type for, as strict JSON text.

`loads(dumps(value))` is the value again, types and bits included. What JSON lacks is tagged: `{"$tuple": [...]}`;
`{"$dict": [[key, value], ...]}` for other keys than plain strings; `{"$float": "7ff8000000000000"}` for nan and inf,
the bits of the double; `{"$int": "0x..."}` beyond 64 bits. Any other object whose keys begin with `$` is malformed.
"""

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

_INT64 = range(-(2**63), 2**63)


def fits_int64(value: int) -> bool:
    """Say whether HDF5's native integer can hold `value`."""
    return value in _INT64


def dumps(value: object) -> str:
    """Return `value` as ASCII JSON text; TypeError or ValueError if no text gives it back."""
    try:
        return json.dumps(_tagged(value), allow_nan=False)
    except RecursionError as error:
        raise ValueError("a list, tuple or dict contains itself or is nested too deeply to store") from error


def loads(text: str) -> Any:
    """Return the value that `dumps` was given; ValueError if `text` is not its output."""
    try:
        return _untagged(json.loads(text, parse_constant=_refuse))
    except (TypeError, struct.error, RecursionError) as error:
        raise ValueError(str(error)) from error


def _tagged(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if fits_int64(value) else {"$int": hex(value)}
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
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _tagged(item) for key, item in value.items()}
    return {"$dict": [[_tagged(key), _tagged(item)] for key, item in value.items()]}


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: _untagged(item) for key, item in value.items()}
    ((tag, body),) = value.items()  # ValueError for more than one key
    if tag not in _UNTAG:
        raise ValueError(f"unknown tag {tag!r}, expected one of {sorted(_UNTAG)}")
    return _UNTAG[tag](body)


_UNTAG: dict[str, Callable[[Any], Any]] = {
    "$int": lambda body: int(body, 16),
    "$float": lambda body: struct.unpack(">d", bytes.fromhex(body))[0],
    "$tuple": lambda body: tuple(_untagged(item) for item in body),
    "$dict": lambda body: {_untagged(key): _untagged(item) for key, item in body},
}


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
