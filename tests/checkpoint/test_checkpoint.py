"""What `load` returns is what `save` was given, and what any HDF5 tool sees is what the documentation says."""

import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import warnings
from itertools import count

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpips import checkpoint
from mpips.checkpoint import CheckpointError, load, newest, save, snapshot, text
from mpips.checkpoint import latch as latch_module

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
DTYPES += [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]


def exact(value):
    """Return what two values share only if they agree in type, dtype, shape, order of a dict's keys and every bit."""
    if isinstance(value, torch.Tensor):
        memory = bytes(value.detach().clone(memory_format=torch.contiguous_format).untyped_storage())
        return "tensor", str(value.dtype), tuple(value.shape), memory
    if isinstance(value, np.ndarray):
        return "ndarray", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, dict):
        return "dict", {exact(key): exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(exact(item) for item in value)
    return type(value).__name__, value


def bits(text, dtype):
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def numpy_bits(data, dtype, shape):
    return np.frombuffer(data, dtype).reshape(shape)


# ---------------------------------------------------------------- round trip

RESERVED = {".", "index", "packed"}
KEYS = st.text(min_size=1, max_size=8).filter(lambda key: "\0" not in key and key not in RESERVED)
KEYS |= st.sampled_from(["fc.weight", "..", "$int", "$tensor", " ", "é", "parameters"])
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # NUL and lone surrogates too
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-(2**80), 2**80) | st.floats() | TEXT
HASHABLE = st.booleans() | st.integers() | TEXT | st.tuples(st.integers(), TEXT)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(st.dictionaries(HASHABLE | st.just("$int"), inner, max_size=3), max_size=2)
    ),
    max_leaves=6,
)


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    numel = int(np.prod(shape))
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(["<f2", "<f4", "<f8", ">f4", ">i8", "<i2", "u1", "<u8", "?"]))
        data = draw(st.binary(min_size=numel * 8, max_size=numel * 8))
        if dtype == "?":
            return numpy_bits(bytes(byte & 1 for byte in data[:numel]), dtype, shape)
        return numpy_bits(data[: numel * np.dtype(dtype).itemsize], dtype, shape)
    dtype = draw(st.sampled_from(DTYPES))
    data = draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize))
    tensor = torch.frombuffer(bytearray(data), dtype=dtype) if numel else torch.empty(0, dtype=dtype)
    return tensor.reshape(shape).transpose(0, -1) if len(shape) > 1 else tensor.reshape(shape)


TREES = st.recursive(
    st.dictionaries(KEYS, PLAIN | arrays(), max_size=4), lambda inner: st.dictionaries(KEYS, inner | PLAIN, max_size=4)
)
STEPS = count()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tree=TREES)
def test_a_tree_comes_back_bit_for_bit(tree, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    assert exact(load(save(folder, next(STEPS), tree))) == exact(tree)


EXACT = {
    "signalling nan with payload": bits("0100a07f", torch.float32),
    "negative nan, bfloat16": bits("a5ff", torch.bfloat16),
    "negative zero": torch.tensor([-0.0, 0.0]),
    "smallest denormal": bits("0100000000000000", torch.float64),
    "bool": torch.tensor([True, False, True]),
    "bool array": np.array([[True], [False]]),
    "largest uint64": torch.tensor([2**64 - 1], dtype=torch.uint64),
    "0-d": torch.tensor(3.5),
    "0-d bfloat16": torch.tensor(3.5, dtype=torch.bfloat16),
    "0-d array": np.array(7, np.int16),
    "zero-size": torch.zeros(0, 3, dtype=torch.bfloat16),
    "zero-size array": np.zeros((2, 0), np.float16),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "transposed bfloat16": torch.arange(6.0).bfloat16().reshape(2, 3).t(),
    "expanded": torch.arange(3.0).expand(4, 3),
    "strided": torch.arange(10)[1::3],
    "reversed array": np.arange(5.0)[::-1],
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">i4"),
    "requires grad": torch.ones(2, requires_grad=True),
    "requires grad, bfloat16": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    "nan": float("nan"),
    "negative nan with payload": struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0],
    "nan in a list": [struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0], float("-inf"), -0.0],
    "beyond 64 bits": -(2**200),
    "edges of 64 bits": [2**63 - 1, 2**63, -(2**63), -(2**63) - 1],
    "5,000 digits": 10**5000,
    "beyond 64 KiB": "ä" * 100_000,
    "NUL": "a\0b\0",
    "lone surrogate": "\ud800",
    "empty text": "",
    "random state": (3, (1, 2, 3), None),
    "int keys": [{0: 1, "0": 2, (1, "a"): 3, True: 4}],
    "keys that look like tags": [{"$tuple": [1]}, {"$int": "0x1", "a": 1}],
    "empty list": [],
    "empty dict": {},
}


@pytest.mark.parametrize("leaf", EXACT.values(), ids=EXACT.keys())
def test_exact(leaf, tmp_path):
    assert exact(load(save(tmp_path, 1, {"deep": {"leaf": leaf}}))) == exact({"deep": {"leaf": leaf}})


def test_children_keep_their_order(tmp_path):
    tensors = {f"layer{number}": torch.ones(1) for number in range(30, 0, -1)}
    scalars = {f"setting{number}": number for number in range(30, 0, -1)}
    loaded = load(save(tmp_path, 1, {"tensors": tensors, **scalars, "scalars": scalars}))
    assert list(loaded) == ["tensors", *scalars, "scalars"]
    assert list(loaded["tensors"]) == list(tensors) and list(loaded["scalars"]) == list(scalars)


def test_numpy_scalars_become_the_numbers_they_equal(tmp_path):
    loaded = load(save(tmp_path, 1, {"lr": np.float64(0.1), "half": np.float32(0.5), "n": [np.int16(3)]}))
    assert exact(loaded) == exact({"lr": 0.1, "half": 0.5, "n": [3]})


def test_state_of_an_optimizer(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    tree = {"model": model.state_dict(), "state": {str(n): s for n, s in state["state"].items()}}
    tree["groups"] = state["param_groups"]
    loaded = load(save(tmp_path, 1, tree))
    twin = torch.optim.Adam(model.parameters())
    twin.load_state_dict({"state": {int(n): s for n, s in loaded["state"].items()}, "param_groups": loaded["groups"]})
    assert exact([loaded["model"], twin.state_dict()]) == exact([dict(model.state_dict()), state])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_come_back_on_the_host(tmp_path):
    tensor = torch.randn(3, 4, dtype=torch.bfloat16)
    loaded = load(save(tmp_path, 1, {"w": tensor.cuda().t()}))
    assert loaded["w"].device.type == "cpu" and exact(loaded["w"]) == exact(tensor.t())


# ---------------------------------------------------------------- what the file looks like


def test_plain_h5py_reads_the_file(tmp_path):
    weight, large = torch.arange(6.0).reshape(2, 3), torch.arange(1 << 15).reshape(2, -1)
    tree = {"round": 3, "betas": (0.9, float("inf")), "parameters": {"fc.weight": weight, "a/b": torch.ones(2).bfloat16()}}
    tree |= {"kept": {"ema": {"w": weight.clone()}}, "state": {"fc": {"step": weight + 1, "large": large}}, "empty": {}}
    path = save(tmp_path, 42, tree)
    assert path == tmp_path / "round_00000042.h5"
    with h5py.File(path, "r") as file:
        assert (file.attrs["format"], file.attrs["format_version"]) == (b"mpips-checkpoint", 3)
        found = {}
        file.visititems(lambda name, item: found.update({name: item}))
        datasets = {name for name, item in found.items() if isinstance(item, h5py.Dataset)}
        assert datasets == {  # the small ones, too, of what people look for
            "parameters/fc.weight", "parameters/a%2Fb", "kept/ema/w", "state/fc/large", "packed/float32.0", "index"
        }  # fmt: skip
        dataset = file["parameters/fc.weight"]
        assert dataset.dtype == np.float32 and dataset[()].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert dataset.chunks is None and dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        assert file["parameters/a%2Fb"][()].tolist() == [0x3F80] * 2
        assert dict(file["parameters/a%2Fb"].attrs) == {"dtype": b"bfloat16"}
        index = json.loads(file["index"][()].tobytes())
        assert index["round"] == 3 and index["betas"] == {"$tuple": [0.9, {"$float": "7ff0000000000000"}]}
        for place, expected in ((index["state"]["fc"]["step"], weight + 1), (index["state"]["fc"]["large"], large)):
            dtype, shape, name, first, at = place["$tensor"]
            array = file[name][()].reshape(-1)[first : first + expected.numel()].reshape(shape)
            assert torch.equal(torch.from_numpy(array), expected)
            assert np.array_equal(np.fromfile(path, dtype, expected.numel(), offset=at).reshape(shape), array)


def test_text_of_a_file_is_of_fixed_length(tmp_path):
    """Text of variable length lies in a global heap, in which libhdf5 can be made to loop for ever."""
    path = save(tmp_path, 1, {"mode": "sync", "parameters": {"w": torch.ones(2, dtype=torch.bfloat16)}, "note": "x" * 100_000})
    assert b"GCOL" not in path.read_bytes()


def test_small_tensors_share_datasets(tmp_path):
    """A dataset each took 0.25 ms to write and 0.3 ms to read; of 30,000 that was most of a checkpoint."""
    state = {f"layer{n}": {"step": torch.tensor(float(n)), "mean": torch.full((5,), n), "seen": np.array([n % 2 > 0])}
             for n in range(3000)}  # fmt: skip
    path = save(tmp_path, 1, {"optimizer": {"state": state}})
    with h5py.File(path, "r") as file:
        names = []
        file.visit(names.append)
        assert sorted(names) == ["index", "packed", "packed/float32.0", "packed/int64.1", "packed/uint8.2"]
    loaded = load(path)["optimizer"]["state"]
    assert exact(loaded) == exact(state)
    loaded["layer7"]["mean"].zero_()
    assert loaded["layer8"]["mean"].tolist() == [8] * 5 and loaded["layer8"]["mean"].untyped_storage().nbytes() == 40


def test_of_very_many_small_parameters_the_first_have_datasets_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "NAMED", 3)
    tied = torch.full((2,), 9.0)
    tree = {"parameters": {f"w{n}": torch.full((2,), float(n)) for n in range(6)}, "kept": {"large": torch.ones(1 << 14)}}
    tree["parameters"] |= {"tied": tied, "again": tied}
    path = save(tmp_path, 1, tree)
    with h5py.File(path, "r") as file:
        assert sorted(file["parameters"]) == ["w0", "w1", "w2"]
        assert len(file["packed/float32.0"]) == 2 * 4
        assert file["kept/large"].shape == (1 << 14,)
    assert exact(load(path)) == exact(tree)


def test_small_tensors_are_put_together_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_TOGETHER", 100)
    tree = {"state": {str(n): torch.full((7,), float(n)) for n in range(20)}, "none": torch.zeros(0, 3), "late": torch.ones(1)}
    path = save(tmp_path, 1, tree)
    with h5py.File(path, "r") as file:
        assert [len(file["packed"][f"float32.{n}"]) for n in range(len(file["packed"]))] == [28] * 5 + [1]
    assert exact(load(path)) == exact(tree)


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path):
    weight, small = torch.randn(200, 200), torch.ones(3)
    tree = {"a": weight, "deep": {"b": weight}, "transposed": weight.t(), "bits": weight.view(torch.int32)}
    tree |= {"small": {"a": small, "b": small}, "parameters": {"a": small, "b": small}}
    path = save(tmp_path, 1, tree | {"none": torch.zeros(0), "none too": torch.ones(0)})
    with h5py.File(path, "r") as file:
        assert isinstance(file.get("deep/b", getlink=True), h5py.HardLink)
        assert file["a"] == file["deep/b"] and file["a"] != file["transposed"] and file["a"] != file["bits"]
        assert file["parameters/a"] == file["parameters/b"] and "small" not in file
    assert 3 * weight.nbytes < path.stat().st_size < 3.2 * weight.nbytes
    loaded = load(path)
    assert exact({key: loaded[key] for key in tree}) == exact(tree)
    assert loaded["a"].data_ptr() == loaded["deep"]["b"].data_ptr()
    assert loaded["small"]["a"] is loaded["small"]["b"] and loaded["parameters"]["a"] is loaded["parameters"]["b"]
    assert loaded["none"] is not loaded["none too"]


def test_equal_but_separate_tensors_stay_separate(tmp_path):
    loaded = load(save(tmp_path, 1, {"a": torch.ones(2), "b": torch.ones(2)}))
    assert loaded["a"].data_ptr() != loaded["b"].data_ptr()


def test_sha256sum_agrees(tmp_path):
    path = save(tmp_path, 7, {"w": torch.ones(3)})
    run = subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "round_00000007.h5: OK\n" and run.returncode == 0


def test_mode_is_private_while_writing_and_after_it(tmp_path, monkeypatch):
    seen, pwrite = set(), os.pwrite

    def spy(fd, data, offset):
        if os.fstat(fd).st_size > 200:  # not the sidecar
            seen.add(stat.S_IMODE(os.fstat(fd).st_mode))
        return pwrite(fd, data[:100], offset)  # a disk may always take less than asked

    monkeypatch.setattr(latch_module.os, "pwrite", spy)
    before = os.umask(0o022)
    try:
        path = save(tmp_path, 1, {"w": torch.arange(1000.0)})
    finally:
        os.umask(before)
    assert seen == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_name(f"{path.name}.sha256").stat().st_mode) == 0o600
    assert exact(load(path)) == exact({"w": torch.arange(1000.0)})


def test_saving_takes_the_memory_of_one_tensor(tmp_path):
    size, number = 16 << 20, 6
    tree = {f"w{n}": torch.randn(size // 4).reshape(1024, -1).t() for n in range(number)}  # each must be copied

    def kilobytes(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name))

    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forget the peak
    before = kilobytes("VmRSS")
    save(tmp_path, 1, tree)
    assert (kilobytes("VmHWM") - before) << 10 < 2.5 * size


# ---------------------------------------------------------------- what cannot be stored


@pytest.mark.parametrize("key", ["", ".", "a\0", "\udc80", 1, None])
def test_a_key_that_hdf5_cannot_name(key, tmp_path):
    with pytest.raises(ValueError, match=r"/deep: key "):
        save(tmp_path, 1, {"deep": {key: 1}})
    assert os.listdir(tmp_path) == []


def test_a_slash_in_a_name_is_a_slash_again(tmp_path):
    tree = {"user/buys/item.weight": torch.ones(2), "a%2Fb": 1, "a/b": 2, "100%": {"/": None}}
    assert load(save(tmp_path, 1, tree)).keys() == tree.keys()
    assert load(save(tmp_path, 2, tree))["100%"] == {"/": None}
    assert load(save(tmp_path, 3, tree))["a/b"] == 2


class Opaque:
    pass


UNSTORABLE = {
    "object": (Opaque(), "cannot store a Opaque"),
    "bytes": (b"x", "cannot store a bytes"),
    "complex": (1j, "cannot store a complex"),
    "set": ({1}, "cannot store a set"),
    "tensor in a list": ([torch.ones(1)], "belong in a dict"),
    "complex tensor": (torch.ones(1, dtype=torch.complex64), "complex64"),
    "meta": (torch.empty(2, device="meta"), "no dense values"),
    "sparse": (torch.eye(2).to_sparse(), "no dense values"),
    "text array": (np.array(["a"]), "cannot store <U1"),
    "objects": (np.array([None]), "cannot store object"),
    "long double": (np.zeros(1, np.longdouble), "cannot store float128"),
    "records": (np.zeros(1, "f4,i4"), "cannot store"),
    "masked": (np.ma.masked_array([1.0], [True]), "lose its mask"),
    "datetime": (np.datetime64("2026-01-01"), "cannot store"),
}


@pytest.mark.parametrize(("leaf", "message"), UNSTORABLE.values(), ids=UNSTORABLE.keys())
def test_a_leaf_that_would_not_come_back(leaf, message, tmp_path):
    with pytest.raises(TypeError, match=message) as caught:
        save(tmp_path, 1, {"deep": {"leaf": leaf}})
    assert "/deep" in str(caught.value) and "leaf" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_tree_that_contains_itself(tmp_path):
    loop, ring = {}, []
    loop["again"] = loop
    ring.append(ring)
    for tree in (loop, {"ring": ring}):
        with pytest.raises(ValueError, match="contain"):
            save(tmp_path, 1, tree)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("given", [{"step": -1}, {"keep": 0}, {"tree": {"index": 1}}, {"tree": {"packed": {}}}])
def test_arguments_that_make_no_sense(given, tmp_path):
    with pytest.raises(ValueError, match=r"expected|rename"):
        save(tmp_path, **{"step": 1, "tree": {}} | given)


# ---------------------------------------------------------------- the folder


def names(folder):
    return sorted(os.listdir(folder))


def pairs(*steps):
    return sorted(f"round_{step:08d}.h5{end}" for step in steps for end in ("", ".sha256"))


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(keep, left, tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, {"step": step}, keep=keep)
    assert names(tmp_path) == pairs(*left)
    assert load(newest(tmp_path)) == {"step": 5}


def test_steps_sort_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        save(tmp_path, step, {"step": step})
    assert load(newest(tmp_path)) == {"step": 100_000_000}


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path):
    for step in (1, 2, 3, 4):
        path = save(tmp_path, step, {"step": step}, keep=4)
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "round_00000003.h5.sha256").unlink()
    with pytest.warns(UserWarning) as caught:
        assert newest(tmp_path) == tmp_path / "round_00000002.h5"
    assert [warning.filename for warning in caught] == [__file__, __file__]
    assert "round_00000004.h5: damaged: SHA-256" in str(caught[0].message)
    assert "round_00000003.h5: no SHA-256" in str(caught[1].message)


def test_pruning_never_takes_the_last_good_one(tmp_path):
    for step in (1, 5, 6, 7):
        path = save(tmp_path, step, {"step": step}, keep=4)
        if step > 1:
            path.write_bytes(b"damaged")
    save(tmp_path, 2, {"step": 2}, keep=1)  # resumed from 1, as the newer ones are damaged
    assert names(tmp_path) == pairs(2, 5, 6, 7)
    with pytest.warns(UserWarning, match="damaged"):
        assert load(newest(tmp_path)) == {"step": 2}


def test_a_step_can_be_saved_again(tmp_path):
    for value in (1, 2):
        path = save(tmp_path, 4, {"value": value})
    assert load(path) == {"value": 2}
    assert names(tmp_path) == pairs(4)
    assert len((tmp_path / f"{path.name}.sha256").read_text().splitlines()) == 1


def test_newest_of_nothing(tmp_path):
    (tmp_path / "round_1.h5").touch()
    (tmp_path / "round_00000001.h5.sha256").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path) is None
        assert newest(tmp_path / "not yet") is None


def test_only_the_temporary_files_of_the_dead_are_removed(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    host = socket.gethostname()
    stale = [f".tmp.round_00000009.h5@{host}.{child.pid}", f".tmp.round_00000009.h5.sha256@{host}.{os.getpid()}"]
    others = [f".tmp.round_00000009.h5@{host}.{os.getppid()}", f".tmp.round_00000009.h5@elsewhere.{child.pid}"]
    others += [f".tmp.mine@{host}.{child.pid}", "notes.txt"]
    for name in stale + others:
        (tmp_path / name).touch()
    save(tmp_path, 1, {})
    assert names(tmp_path) == sorted(others + pairs(1))


@pytest.mark.parametrize(("folder", "remedy"), [("missing", "create the folder"), ("file", "give a folder")])
def test_a_folder_that_is_not_there(folder, remedy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"{folder}/round_00000001\.h5: cannot save .*; .*{remedy}") as caught:
        save(tmp_path / folder, 1, {})
    assert isinstance(caught.value.__cause__, OSError)


def test_a_checkpoint_is_read_without_libhdf5(tmp_path):
    path = save(tmp_path, 1, {"parameters": {"w": torch.ones(2)}})
    script = f"""
import sys
import mpips
assert not {{"h5py", "torch"}} & sys.modules.keys()
from mpips.checkpoint import reader
import h5py
h5py.File = None
print(reader.load({str(path)!r}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("{'parameters': {'w': tensor([1., 1.])}}\n", 0), run.stderr


def test_the_public_names_are_there():
    assert checkpoint.__all__ == sorted(checkpoint.__all__)
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)


MALFORMED = ["", "{", "NaN", "[Infinity]", '{"$no": 1}', '{"$tuple": 1}', '{"$tuple": [], "a": 1}', "[" * 100_000]
MALFORMED += ['{"$int": "zz"}', '{"$int": 1}', '{"$float": "00"}', '{"$float": "xx"}']
MALFORMED += ['{"$dict": [[1]]}', '{"$dict": [[[], 1]]}', '{"$dict": [[1, 2], [1, 3]]}', '{"a": 1, "a": 2}', '{"$tensor": 1}']


@pytest.mark.parametrize("malformed", MALFORMED, ids=lambda malformed: malformed[:25])
def test_malformed_text_is_a_value_error(malformed):
    with pytest.raises(ValueError):
        text.loads(malformed)


def test_text_is_strict_json():
    assert re.fullmatch(
        r'\[1, \{"\$float": "7ff8000000000000"\}, \{"\$dict": \[\[2, null\]\]\}\]',
        json.dumps(text.tagged([1, float("nan"), {2: None}])),
    )
