"""No damaged byte is accepted, and no file, however made, leads the reader to another file, to more memory or into a loop.

The hostile files carry a correct SHA-256, so that only the reader stands against them.
"""

import hashlib
import json
import os
import random
import resource
import signal
import struct
import warnings

import h5py
import numpy as np
import pytest
import torch

from mpips.checkpoint import CheckpointError, load, newest, save

FUZZED = int(os.environ.get("FUZZED", "1000"))  # .ci/run tries 20,000

TREE = {"round": 3, "lr": 0.1, "note": [None], "parameters": {"w": torch.randn(20, 30), "mask": torch.tensor([True, False])}}
TREE |= {"state": {f"layer{n}": torch.full((3,), n) for n in range(9)}}


def sign(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")


# ---------------------------------------------------------------- damage


def flip_bit(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def overwrite_block(data, chance):
    at = chance.randrange(len(data))
    return (data[:at] + chance.randbytes(chance.randrange(1, 600)) + data[at + 600 :])[: len(data)]


def truncate(data, chance):
    return data[: chance.randrange(len(data))]


def zero_page(data, chance):
    at = chance.randrange(len(data) // 512) * 512
    return data[:at] + bytes(512) + data[at + 512 :]


def append(data, chance):
    return data + chance.randbytes(chance.randrange(1, 9))


def swap_halves(data, chance):
    at = chance.randrange(1, len(data))
    return data[at:] + data[:at]


DAMAGE = [flip_bit, flip_bit, flip_bit, overwrite_block, truncate, zero_page, append, swap_halves]


def test_no_damage_is_accepted(tmp_path, record_property):
    path = save(tmp_path, 1, TREE)
    good, chance = path.read_bytes(), random.Random(20261121)
    tried = 0
    while tried < 10_000:
        bad = chance.choice(DAMAGE)(good, chance)
        if bad == good:
            continue
        tried += 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"round_00000001\.h5: damaged"):
            load(path)
    with pytest.warns(UserWarning, match="damaged"):
        assert newest(tmp_path) is None
    path.write_bytes(good)
    assert newest(tmp_path) == path  # so it was the damage that was refused
    record_property("faults", tried)


@pytest.mark.parametrize("sidecar", ["", "0" * 64, f"{'0' * 64}  round_00000001.h5\n", "\xff\n", "{hash}\n", "{hash}  x.h5\n"])
def test_a_wrong_sidecar(sidecar, tmp_path):
    path = save(tmp_path, 1, TREE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / f"{path.name}.sha256").write_text(sidecar.format(hash=digest))
    with pytest.raises(CheckpointError, match=r"no SHA-256|damaged"):
        load(path)


def test_the_sidecar_of_another_step(tmp_path):
    first, second = save(tmp_path, 1, TREE), save(tmp_path, 2, {"round": 4})
    os.replace(f"{first}.sha256", f"{second}.sha256")
    for path in (first, second):
        with pytest.raises(CheckpointError, match="no SHA-256"):
            load(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_path_that_is_no_file(kind, tmp_path):
    path = tmp_path / "round_00000001.h5"
    {"missing": lambda _: None, "folder": os.mkdir, "pipe": os.mkfifo}[kind](path)
    with pytest.raises(CheckpointError, match=r"round_00000001\.h5: "):
        load(path)


# ---------------------------------------------------------------- an index that mpips never writes


def build(path, index, version=3, name=b"mpips-checkpoint", begin=b"\x89HDF\r\n\x1a\n", past=0):
    """A file of 1,008 bytes, an index and a footer."""
    body = begin.ljust(1008, b"\x02")
    index = index if isinstance(index, bytes) else json.dumps(index).encode()
    path.write_bytes(body + index + struct.pack("<QQI16s", len(body) + past, len(index), version, name))
    sign(path)


def tensor(dtype="uint8", shape=(4,), at=8, kind="$tensor"):
    return {kind: [dtype, shape, "/w", 0, at]}


def test_what_is_built_here_is_read(tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, {"w": tensor(), "v": tensor(at=100), "again": tensor(), "a": tensor(">u2", (1, 2), kind="$array")})
    loaded = load(path)
    assert loaded["w"].tolist() == [2] * 4 and loaded["again"] is loaded["w"] and loaded["v"] is not loaded["w"]
    assert loaded["a"].tolist() == [[514, 514]] and loaded["a"].dtype == ">u2"


NEVER_WRITTEN = {
    "past the end": {"w": tensor(shape=[100], at=1100)},
    "more than the file": {"w": tensor(shape=[1 << 40])},
    "more than 64 bits": {"w": tensor(shape=[1 << 40, 1 << 40])},
    "far away": {"w": tensor(at=1 << 70)},
    "claimed often": {str(n): tensor(shape=[900, *[1] * n]) for n in range(3)},
    "negative": {"w": tensor(shape=[-1])},
    "negative twice": {"w": tensor(shape=[-2, -2])},
    "before the file": {"w": tensor(at=-1)},
    "65 dimensions": {"w": tensor(shape=[1] * 65)},
    "a length that is no number": {"w": tensor(shape=["4"])},
    "a length that is a bool": {"w": tensor(shape=[True])},
    "a length that is a float": {"w": tensor(shape=[4.0])},
    "a shape that is no list": {"w": tensor(shape=4)},
    "a place that is no number": {"w": tensor(at="8")},
    "no place": {"w": {"$tensor": ["uint8", [4], "/w", 0]}},
    "no list": {"w": {"$tensor": None}},
    "objects": {"w": tensor("object", kind="$array")},
    "objects, big-endian": {"w": tensor(">O", kind="$array")},
    "records": {"w": tensor(">i4,i4", kind="$array")},
    "no dtype": {"w": tensor(None)},
    "a dtype that is a list": {"w": tensor(["uint8"])},
    "a dtype of another kind": {"w": tensor("bfloat16", kind="$array")},
    "a big-endian tensor": {"w": tensor(">u2")},
    "a dtype that is a function": {"w": tensor("load")},
    "a bool that is neither": {"w": tensor("bool")},
    "an array's bool that is neither": {"w": tensor("bool", kind="$array")},
    "another tag": {"w": {"$eval": "1"}},
    "two tags": {"w": {**tensor(), **tensor(kind="$array")}},
    "no tree": [1],
    "nothing": b"",
    "no JSON": b"{",
    "NaN": b'{"a": NaN}',
    "no text": b'{"a": "\xff"}',
    "too deep": b'{"a": ' + b"[" * 200_000,
    "a key twice": b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("index", NEVER_WRITTEN.values(), ids=NEVER_WRITTEN.keys())
def test_an_index_that_mpips_never_writes(index, tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, index)
    with pytest.raises(CheckpointError, match=r"round_00000001\.h5: .*; load only files that mpips wrote") as caught:
        load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


FOOTERS = {
    "another layout": ({"version": 4}, "is of layout 4, expected 3"),
    "another name": ({"name": b"x" * 16}, "has no index at its end"),
    "an index past the end": ({"past": 100}, "its index ends at byte"),
    "an index far away": ({"past": 1 << 63}, "its index ends at byte"),
    "no HDF5": ({"begin": b"PK"}, "does not begin as an HDF5 file"),
}


@pytest.mark.parametrize("given, message", FOOTERS.values(), ids=FOOTERS.keys())
def test_a_footer_that_mpips_never_writes(given, message, tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, {}, **given)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("size", [0, 8, 30, 60])
def test_a_file_that_is_too_short(size, tmp_path):
    path = tmp_path / "round_00000001.h5"
    path.write_bytes(save(tmp_path, 2, {}).read_bytes()[:size])
    sign(path)
    with pytest.raises(CheckpointError, match=r"round_00000001\.h5: (\d+ bytes are no checkpoint|has no index)"):
        load(path)


def older(file):
    """As layout 2 was: text of variable length as attributes."""
    file.attrs["format"], file.attrs["format_version"] = "mpips-checkpoint", 2
    file.attrs["mode"] = "sync"
    file.create_dataset("parameters/w", data=np.ones(3)).attrs["kind"] = "tensor"


def external_link(file):
    file["w"] = h5py.ExternalLink("secret.h5", "/w")


@pytest.mark.parametrize("make", [older, external_link], ids=lambda make: make.__name__)
def test_files_of_others_are_refused_in_one_line(make, tmp_path):
    path = tmp_path / "round_00000001.h5"
    with h5py.File(path, "w") as file:
        make(file)
    sign(path)
    with pytest.raises(CheckpointError, match=r"has no index at its end, as checkpoints of layout 3 have") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_what_another_program_has_changed(tmp_path):
    """It may have moved what the index is about; libhdf5 cuts off what is behind its own."""
    path = save(tmp_path, 1, TREE)
    with h5py.File(path, "r+") as file:
        del file["parameters"]
    sign(path)
    with pytest.raises(CheckpointError, match="another program has changed it"):
        load(path)


def test_global_heaps_are_not_read(tmp_path):
    """libhdf5 loops for ever over an object of index 0 and size 0 in one, when it reads a text of variable length."""
    path = tmp_path / "round_00000001.h5"
    with h5py.File(path, "w") as file:
        older(file)
    data = path.read_bytes()
    at = data.index(b"GCOL") + 16
    path.write_bytes(data[:at] + bytes(16) + data[at + 16 :])
    sign(path)
    assert in_time(load, path) == 0


def in_time(call, *args):
    """The status of a child that calls it, which is to raise CheckpointError within seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            call(*args)
        except CheckpointError:
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("thousand", range(FUZZED // 1000))
def test_any_file_with_a_right_hash_gives_a_tree_or_a_clear_error(thousand, tmp_path, record_property):
    """A thousand mutations that carry a correct SHA-256, in a child; time and memory are limited."""
    record_property("faults", 1000)
    path = save(tmp_path, 1, TREE)
    good = path.read_bytes()
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            outcomes = mutate(path, good, random.Random(7 + thousand))
            os._exit(0 if outcomes["refused"] > 100 and sum(outcomes.values()) == 1000 else 2)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mutate(path, good, chance):
    warnings.simplefilter("ignore")
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
    outcomes = {"refused": 0, "tree": 0}
    for _ in range(1000):
        path.write_bytes(chance.choice(DAMAGE[:6])(good, chance))
        sign(path)
        try:
            assert isinstance(load(path), dict)
            outcomes["tree"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    return outcomes
