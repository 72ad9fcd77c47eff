"""No damaged byte is accepted, and no file, however made, leads the reader to another file or to more memory.

The hostile files are built with plain h5py and carry a correct SHA-256, so that only the reader stands against them.
"""

import ctypes
import hashlib
import os
import random
import resource
import struct
import sys
import warnings

import h5py
import numpy as np
import pytest
import torch

from mpips.checkpoint import CheckpointError, load, newest, save

TREE = {"round": 3, "lr": 0.1, "note": [None], "model": {"w": torch.randn(20, 30), "mask": torch.tensor([True, False])}}


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


def test_no_damage_is_accepted(tmp_path):
    path = save(tmp_path, 1, TREE)
    good, chance = path.read_bytes(), random.Random(20261121)
    tried = 0
    while tried < 2000:
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


# ---------------------------------------------------------------- other files


class Watch:
    """Tells whether anyone in this process opened or read a file, libhdf5's C code included (inotify)."""

    OPEN_OR_ACCESS = 0x20 | 0x1

    def __init__(self, *paths):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for path in paths:
            assert self.libc.inotify_add_watch(self.fd, os.fsencode(path), self.OPEN_OR_ACCESS) >= 0

    def touched(self):
        try:
            return bool(os.read(self.fd, 4096))
        except BlockingIOError:
            return False


OPENED = []
LISTENING = [False]
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if LISTENING[0] and event == "open" else None)


@pytest.fixture
def secrets(tmp_path):
    """Two files that no checkpoint may reach, in another folder."""
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "secret.raw").write_bytes(b"password" * 10)
    with h5py.File(folder / "secret.h5", "w", libver="latest") as file:
        dataset = file.create_dataset("w", data=np.arange(10.0))
        dataset.attrs["kind"] = "tensor"
    return folder


def dataset(group, name, data, kind="tensor", **attributes):
    made = group.create_dataset(name, data=data)
    for key, value in {"kind": kind, **attributes}.items():
        made.attrs[key] = value
    return made


def external_storage(file, folder):
    made = file.create_dataset("w", (10,), "f8", external=[(str(folder / "secret.raw"), 0, 80)])
    made.attrs["kind"] = "tensor"


def virtual(file, folder):
    layout = h5py.VirtualLayout((10,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "w", (10,))
    file.create_virtual_dataset("w", layout).attrs["kind"] = "tensor"


def virtual_unlimited(file, folder):
    layout = h5py.VirtualLayout((10,), "f8", maxshape=(None,))
    source = h5py.VirtualSource(str(folder / "secret.h5"), "w", (10,), maxshape=(None,))
    layout[h5py.h5s.UNLIMITED and slice(0, h5py.h5s.UNLIMITED)] = source[0 : h5py.h5s.UNLIMITED]
    file.create_virtual_dataset("w", layout).attrs["kind"] = "tensor"


def external_link(file, folder):
    file["w"] = h5py.ExternalLink(str(folder / "secret.h5"), "/w")


def external_link_inside(file, folder):
    file["g/w"] = h5py.ExternalLink(str(folder / "secret.h5"), "/w")


def soft_link(file, folder):
    dataset(file, "v", np.ones(3))
    file["w"] = h5py.SoftLink("/v")


def soft_link_to_an_external_one(file, folder):
    file["z"] = h5py.ExternalLink(str(folder / "secret.h5"), "/")
    file["w"] = h5py.SoftLink("/z/w")


REACHING_OUT = [external_storage, virtual, virtual_unlimited, external_link, external_link_inside]
REACHING_OUT += [soft_link, soft_link_to_an_external_one]


def build(path, make, *args, libver="latest", **options):
    with h5py.File(path, "w", libver=libver, **options) as file:
        file.attrs["format"], file.attrs["format_version"] = "mpips-checkpoint", 2
        make(file, *args)
    sign(path)


@pytest.mark.parametrize("make", REACHING_OUT, ids=lambda make: make.__name__)
def test_no_other_file_is_opened(make, secrets, tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, make, secrets)
    watch = Watch(secrets / "secret.raw", secrets / "secret.h5")
    OPENED.clear()
    LISTENING[0] = True
    try:
        with pytest.raises(CheckpointError, match=r"'/(g/)?[wz]' (is|keeps)"):
            load(path)
    finally:
        LISTENING[0] = False
    assert set(OPENED) == {str(path), f"{path}.sha256"}
    assert not watch.touched()


@pytest.mark.parametrize("make", [external_storage, virtual, external_link], ids=lambda make: make.__name__)
def test_the_watch_sees_what_plain_h5py_opens(make, secrets, tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, make, secrets)
    watch = Watch(secrets / "secret.raw", secrets / "secret.h5")
    with h5py.File(path, "r") as file:
        assert file["w"][()].tobytes() in (b"password" * 10, np.arange(10.0).tobytes())
    assert watch.touched()


# ---------------------------------------------------------------- everything else that mpips never writes


def chunked(file):
    file.create_dataset("w", data=np.ones(8), chunks=(4,)).attrs["kind"] = "tensor"


def compressed(file):
    file.create_dataset("w", data=np.ones(8), compression="gzip").attrs["kind"] = "tensor"


def compact(file):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"w", h5py.h5t.IEEE_F64LE, h5py.h5s.create_simple((2,)), properties)
    file["w"].attrs["kind"] = "tensor"


def shape_bomb(file):
    file.create_dataset("w", (1 << 40,), "f4").attrs["kind"] = "tensor"


def shape_overflow(file):
    file.create_dataset("w", (1 << 31, 1 << 31, 1 << 2), "u1").attrs["kind"] = "tensor"


def nothing_stored(file):
    file.create_dataset("w", (4,), "f4").attrs["kind"] = "tensor"  # libhdf5 would make up zeros


def cycle(file):
    file["g/h/again"] = file.create_group("g")


def root_cycle(file):
    file["again"] = file["/"]


def second_name(file):
    file["h"] = file.create_group("g")


def too_deep(file):
    file.create_group("/".join("g" * 300))


def committed_type(file):
    file["w"] = np.dtype("f8")


def dataset_of_committed_type(file):
    file["t"] = np.dtype("f8")
    file.create_dataset("a", data=np.ones(3), dtype=file["t"]).attrs["kind"] = "tensor"
    del file["t"]  # nothing but the dataset leads to it


def references(file):
    dataset(file, "w", np.array([file.ref], dtype=h5py.ref_dtype))


def regions(file):
    made = dataset(file, "v", np.ones(3))
    dataset(file, "w", np.array([made.regionref[0:2]], dtype=h5py.regionref_dtype))


def typed(dtype):
    def make(file):
        made = file.create_dataset("w", (2,), dtype)
        made.attrs["kind"] = "tensor"
        if h5py.check_dtype(vlen=made.dtype) is None:
            made[()] = np.zeros(made.shape, made.dtype)

    make.__name__ = f"dtype {dtype}"
    return make


def odd_float(file):
    odd = h5py.h5t.IEEE_F32LE.copy()
    odd.set_ebias(100)
    h5py.h5d.create(file.id, b"w", odd, h5py.h5s.create_simple((2,))).write(h5py.h5s.ALL, h5py.h5s.ALL, ONES)
    file["w"].attrs["kind"] = "tensor"


def no_shape(file):
    dataset(file, "w", h5py.Empty("f4"))


def marked(data, named=None, **marks):
    def make(file):
        made = file.create_dataset("w", data=data)
        for key, value in marks.items():
            made.attrs[key] = value

    make.__name__ = named or f"{data.dtype} {marks}"
    return make


def attribute(key, value):
    def make(file):
        file.attrs[key] = value

    make.__name__ = f"attribute {key} {str(value)[:30]}"
    return make


def attribute_twice(file):
    file.attrs["w"], file.attrs["w.json"] = 1, "1"


def attribute_and_link(file):
    file.attrs["w"] = 1
    dataset(file, "w", np.ones(3))


def committed_attribute(file):
    file["t"] = np.dtype("i8")
    file.attrs.create("a", 1, dtype=file["t"])
    del file["t"]


def attribute_that_is_no_text(file):
    file.attrs.create("a", b"\xff", dtype=h5py.string_dtype())


def name_that_is_no_text(file):
    h5py.h5g.create(file.id, b"\xff")


def mark(key, value):
    def make(file):
        if value is None:
            del file.attrs[key]
        else:
            file.attrs[key] = value

    make.__name__ = f"{key} {value}"
    return make


ONES = np.ones(2, np.float32)
NEVER_WRITTEN = [
    chunked,
    compressed,
    compact,
    shape_bomb,
    shape_overflow,
    nothing_stored,
    cycle,
    root_cycle,
    second_name,
    too_deep,
]
NEVER_WRITTEN += [committed_type, dataset_of_committed_type, references, regions, odd_float, no_shape]
NEVER_WRITTEN += [typed("S5"), typed(h5py.string_dtype()), typed(h5py.vlen_dtype("i4")), typed("c8"), typed("V3")]
NEVER_WRITTEN += [typed(np.dtype("f4,i4")), typed(np.longdouble), typed(np.dtype(("i4", (2,)))), typed(bool)]
NEVER_WRITTEN += [typed(h5py.enum_dtype({"a": 1}, "i4"))]
NEVER_WRITTEN += [marked(ONES), marked(ONES, kind="pickle"), marked(ONES, kind=1), marked(ONES, kind="tensor", more=1)]
NEVER_WRITTEN += [marked(ONES, kind="tensor", dtype="bfloat16"), marked(np.zeros(2, "u2"), kind="tensor", dtype="load")]
NEVER_WRITTEN += [marked(np.zeros(2, ">u2"), kind="tensor", dtype="bfloat16"), marked(ONES, kind="tensor", dtype=1)]
NEVER_WRITTEN += [marked(ONES, **{"kind": "tensor", "dtype.json": "[]"}), marked(ONES.astype(">f4"), kind="tensor")]
NEVER_WRITTEN += [
    marked(np.full(2, 2, "u1"), kind="tensor", dtype="bool"),
    marked(np.full(2, 9, "u1"), kind="ndarray", dtype="bool"),
]
NEVER_WRITTEN += [marked(np.zeros(2, "u2"), kind="ndarray", dtype="bfloat16")]
NEVER_WRITTEN += [attribute("a", np.ones(2)), attribute("a", np.int32(1)), attribute("a", np.bytes_(b"x"))]
NEVER_WRITTEN += [attribute("a", np.array([1], h5py.vlen_dtype("i4"))[0:0]), attribute("a", h5py.Empty("f8"))]
NEVER_WRITTEN += [attribute("a", np.zeros((), "f4,i4")), attribute_that_is_no_text]
NEVER_WRITTEN += [attribute("a.json", "{"), attribute("a.json", "NaN"), attribute("a.json", '{"$eval": "1"}')]
NEVER_WRITTEN += [attribute("a.json", 5), attribute(".json", "1"), attribute("a/b", 1), attribute(".", 1)]
NEVER_WRITTEN += [attribute_twice, attribute_and_link, committed_attribute, name_that_is_no_text]
NEVER_WRITTEN += [
    mark("format", None),
    mark("format", "keras"),
    mark("format_version", None),
    mark("format_version", 1),
]
NEVER_WRITTEN += [mark("format_version", "1")]


@pytest.mark.parametrize("make", NEVER_WRITTEN, ids=lambda make: make.__name__)
def test_what_mpips_never_writes_is_refused_by_name(make, tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, make)
    with pytest.raises(CheckpointError, match=r"round_00000001\.h5: '/.*expected"):
        load(path)


def test_a_reference_as_attribute(tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, lambda file: file.attrs.create("a", file.ref, dtype=h5py.ref_dtype))
    with pytest.raises(CheckpointError, match="'/@a' is not a plain scalar"):
        load(path)


def test_a_user_block(tmp_path):
    path = tmp_path / "round_00000001.h5"
    build(path, lambda file: None, userblock_size=512)
    with pytest.raises(CheckpointError, match="does not begin as an HDF5 file"):
        load(path)


def claim(path, offset, number, size):
    """Point `number` datasets without storage at `offset`: old object headers carry no checksum."""
    data, missing = path.read_bytes(), b"\xff" * 8 + struct.pack("<Q", size)
    assert data.count(missing) == number
    path.write_bytes(data.replace(missing, struct.pack("<QQ", offset, size)))
    sign(path)


@pytest.mark.parametrize("where", ["shared", "past the end"])
def test_bytes_that_are_not_there_or_claimed_twice(where, tmp_path):
    path, size = tmp_path / "round_00000001.h5", 40_000

    def make(file):
        dataset(file, "a", np.ones(size, "u1"))
        for name in "bcd":
            file.create_dataset(name, (size,), "u1").attrs["kind"] = "tensor"

    build(path, make, libver="earliest")
    with h5py.File(path, "r") as file:
        offset = file["a"].id.get_offset()
    claim(path, offset if where == "shared" else path.stat().st_size - 100, 3, size)
    if where == "shared":
        with h5py.File(path, "r") as file:
            assert file["b"][()].tolist() == [1] * size  # the forgery took
    with pytest.raises(CheckpointError, match=r"'/[bcd]' declares 40000 bytes|invalid dataset size"):
        load(path)


def test_any_file_with_a_right_hash_gives_a_tree_or_a_clear_error(tmp_path):
    """A thousand mutations that carry a correct SHA-256, in a child as libhdf5 might crash; memory is limited."""
    path = save(tmp_path, 1, TREE)
    good = path.read_bytes()
    child = os.fork()
    if child == 0:
        try:
            outcomes = mutate(path, good, random.Random(7))
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
