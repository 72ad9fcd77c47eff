"""Death, power cuts and failing disks at every step of a save: the new or the previous checkpoint, nothing else.

`Disk` stands between the checkpoint and the operating system. Before each change it says which files a process would
find if this one died here, and which a machine would find if the power failed here: what was not synced may be lost.
"""

import errno
import itertools
import os
import resource
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from mpips.checkpoint import CheckpointError, folder, latch, load, newest, save, writer

OLD = {"round": 1, "w": torch.arange(4.0)}
NEW = {"round": 2, "w": torch.arange(4.0) * 2, "tied": {"b": torch.tensor([True])}, "note": [None]}
SCENES = {  # what is on the disk before NEW is saved as step 2, and how many to keep
    "first": ([], 3),
    "next": ([1], 3),
    "next, the old one pruned": ([1], 1),
    "the same step again": ([2], 3),
}


class Disk:
    """The `os` of the checkpoint: calls `before(event)` and then the real thing."""

    CHANGES = ("open", "pwrite", "ftruncate", "fsync", "fchmod", "replace", "unlink")

    def __init__(self, monkeypatch, byte_by_byte=False):
        self.events, self.byte_by_byte = [], byte_by_byte
        for module in (folder, latch):
            monkeypatch.setattr(module, "os", self)

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def call(*args):
            if name == "pwrite" and self.byte_by_byte:
                args = (args[0], args[1][:1], args[2])
            if name != "open" or args[1] & os.O_CREAT:
                self.before(name, args)
                self.events.append(name)
            done = real(*args)
            self.after(name, args, done)
            return done

        return call

    def before(self, name, args):
        """Look at the disk, or raise, or die."""

    def after(self, name, args, done):
        """Take note of what is durable now."""


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    """Write as a large file is written: hashed on a thread beside, and synced before the hash is known."""
    if request.param:
        monkeypatch.setattr(writer, "LARGE", 0)


def prepare(path, scene):
    steps, keep = SCENES[scene]
    for step in steps:
        save(path, step, OLD)
    return keep


def found(path):
    """Return the round of the checkpoint that a new process would resume from; fail unless it is OLD or NEW in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latest = newest(path)
    if latest is None:
        return None
    tree = load(latest)
    expected = {1: OLD, 2: NEW}[tree["round"]]
    assert tree.keys() == expected.keys() and torch.equal(tree["w"], expected["w"])
    return tree["round"]


# ---------------------------------------------------------------- every instant


class PowerCuts(Disk):
    """Collects each state that a death or a power cut could leave; only names that `newest` looks at matter."""

    def __init__(self, monkeypatch, path):
        super().__init__(monkeypatch, byte_by_byte=True)
        self.path, self.states = path, {}
        self.contents = {}  # inode -> bytes now
        self.synced = {}  # inode -> bytes that survive a power cut
        self.entries = self.names()  # name -> inode, as the synced folder has it
        self.synced.update({inode: self.contents[inode] for inode in self.entries.values()})

    def names(self):
        names = {}
        for entry in os.scandir(self.path):
            if entry.name.startswith("round_"):
                names[entry.name] = entry.inode()
                self.contents[entry.inode()] = Path(entry.path).read_bytes()
        return names

    def before(self, name, args):
        self.look()

    def after(self, name, args, done):
        if name == "open" and args[1] & os.O_CREAT:
            self.synced[os.fstat(done).st_ino] = b""  # perhaps the number of a file now gone
        elif name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}"):
            self.entries = self.names()
        elif name == "fsync":
            self.synced[os.fstat(args[0]).st_ino] = Path(f"/proc/self/fd/{args[0]}").read_bytes()

    def look(self):
        now = self.names()
        self.note(now, self.contents)
        changed = [name for name in self.entries.keys() | now.keys() if self.entries.get(name) != now.get(name)]
        for chosen in itertools.product((False, True), repeat=len(changed)):  # each renaming may be lost alone
            lost = {name: self.entries.get(name) for name, is_lost in zip(changed, chosen, strict=True) if is_lost}
            names = {name: inode for name, inode in (now | lost).items() if inode is not None}
            for contents in (self.contents, self.contents | self.synced):
                self.note(names, contents)

    def note(self, names, contents):
        state = frozenset((name, contents[inode]) for name, inode in names.items())
        self.states.setdefault(state, f"event {len(self.events)}, after {self.events[-1:]}")


@pytest.mark.parametrize("scene", SCENES)
def test_after_a_crash_at_any_byte_the_new_or_the_previous_is_found(scene, large, tmp_path, monkeypatch, record_property):
    run = tmp_path / "run"
    run.mkdir()
    keep = prepare(run, scene)
    previous = found(run)
    with monkeypatch.context() as patch:
        disk = PowerCuts(patch, run)
        save(run, 2, NEW, keep=keep)
        during, disk.states = disk.states, {}
        disk.look()  # the save has returned: its result must outlive a power cut
    assert len(disk.events) > 1000  # one per byte
    for number, (state, when) in enumerate([*during.items(), *disk.states.items()]):
        wreck = tmp_path / f"wreck{number}"
        wreck.mkdir()
        for name, content in state:
            (wreck / name).write_bytes(content)
        allowed = {2} if number >= len(during) else {previous, 2}
        assert found(wreck) in allowed, f"{when}: {sorted(name for name, _ in state)}"
    assert {found(tmp_path / f"wreck{number}") for number in range(number + 1)} == {previous, 2}
    record_property("faults", len(disk.events))  # instants; the states that they leave are fewer


class Deadly(Disk):
    """Ends the process before event `deadline`, or half way through it if it is a write."""

    def __init__(self, monkeypatch, deadline, half):
        super().__init__(monkeypatch)
        self.deadline, self.half = deadline, half

    def before(self, name, args):
        if len(self.events) == self.deadline:
            if self.half and name == "pwrite":
                os.pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
            os._exit(9)


def in_a_child(work, *args):
    """Run `work` in a forked process and return its exit status; a signal that kills it is negative."""
    child = os.fork()
    if child == 0:
        try:
            work(*args)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("half", [False, True], ids=["before", "half"])
def test_a_process_that_dies_at_any_step_leaves_nothing_in_the_way(half, large, tmp_path, monkeypatch, record_property):
    save(tmp_path, 1, OLD)

    def die_at(deadline):
        Deadly(monkeypatch, deadline, half)
        save(tmp_path, 2, NEW)

    for deadline in itertools.count():
        if in_a_child(die_at, deadline) == 0:
            break
        assert found(tmp_path) in (1, 2)
        if deadline % 10 == 0:
            save(tmp_path, 2, NEW)
            assert found(tmp_path) == 2 and not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]
            for path in tmp_path.glob("round_00000002*"):
                path.unlink()
    assert deadline > 20 and found(tmp_path) == 2
    record_property("faults", deadline)


# ---------------------------------------------------------------- disks that fail


class Failing(Disk):
    """Raises `error` from event `at` on, or there alone; events are those that `only` picks."""

    def __init__(self, monkeypatch, error, at=0, lasting=True, only=lambda name, args: name != "unlink"):
        super().__init__(monkeypatch)
        self.error, self.at, self.lasting, self.only = error, at, lasting, only
        self.met = 0
        self.failed = False

    def before(self, name, args):
        if self.only(name, args):
            self.met += 1
            if self.met - 1 == self.at or (self.lasting and self.met > self.at):
                self.failed = True
                raise self.error


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lasting", [True, False], ids=["lasting", "once"])
def test_an_error_at_any_step_is_one_clear_line(scene, code, lasting, large, tmp_path, monkeypatch, record_property):
    keep = prepare(tmp_path, scene)
    previous = found(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for at in itertools.count():
        with monkeypatch.context() as patch:
            disk = Failing(patch, OSError(code, os.strerror(code)), at, lasting)
            if run_out(tmp_path, keep):
                break
        published = disk.events.count("replace") > 1  # the sidecar, then the checkpoint
        assert disk.failed and not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]
        assert found(tmp_path) in ((previous, 2) if published else (previous,)), f"at {at}, after {disk.events[-3:]}"
        restore(tmp_path, before)
    assert at > 20 and not disk.failed and found(tmp_path) == 2
    record_property("faults", at)


def run_out(path, keep):
    """Return whether the save succeeded; its error must be a CheckpointError that names the file and a remedy."""
    try:
        save(path, 2, NEW, keep=keep)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}/round_00000002.h5: cannot save the checkpoint (")
        assert str(error).endswith(("free some space, keep fewer checkpoints or choose another disk", "check the disk"))
        return False
    return True


def restore(path, before):
    for name in os.listdir(path):
        (path / name).unlink()
    for name, content in before.items():
        (path / name).write_bytes(content)


UNSUPPORTED = {  # by file systems that are in use: CIFS, vfat, some of FUSE and Ceph
    "fsync of a folder, EINVAL": ("fsync", errno.EINVAL, os.path.isdir),
    "fsync of a folder, EOPNOTSUPP": ("fsync", errno.EOPNOTSUPP, os.path.isdir),
    "fsync of a file, ENOSYS": ("fsync", errno.ENOSYS, os.path.isfile),
    "fchmod, EPERM": ("fchmod", errno.EPERM, os.path.isfile),
    "fchmod, ENOTSUP": ("fchmod", errno.ENOTSUP, os.path.isfile),
}


@pytest.mark.parametrize("name, code, of", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_a_file_system_does_not_know_does_not_end_a_run(name, code, of, tmp_path, monkeypatch):
    save(tmp_path, 1, OLD)
    error = OSError(code, os.strerror(code))
    disk = Failing(monkeypatch, error, only=lambda call, args: call == name and of(f"/proc/self/fd/{args[0]}"))
    save(tmp_path, 2, NEW)
    assert disk.failed and found(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == [f"round_0000000{n}.h5{end}" for n in (1, 2) for end in ("", ".sha256")]


def test_an_interrupt_inside_libhdf5_is_raised_once_it_is_done(large, tmp_path, monkeypatch):
    save(tmp_path, 1, OLD)
    for at in range(8):
        with monkeypatch.context() as patch:
            Failing(patch, KeyboardInterrupt(), at, lasting=False, only=lambda name, args: name == "pwrite")
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 2, NEW)
        assert found(tmp_path) == 1 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("at", [0, 50], ids=["structure", "values"])
def test_a_full_disk_ends_the_work_at_once(at, tmp_path, monkeypatch):
    disk = Failing(monkeypatch, OSError(errno.ENOSPC, "full"), at, only=lambda name, args: name == "pwrite")
    with pytest.raises(CheckpointError):
        save(tmp_path, 1, {f"w{number}": torch.ones(100_000) for number in range(100)})
    assert disk.met == at + 1  # nothing more was written


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    old = save(tmp_path, 1, OLD)
    Failing(monkeypatch, OSError(errno.EPERM, "no"), only=lambda name, args: name == "unlink" and args[0] == old)
    with pytest.warns(UserWarning, match="cannot remove old checkpoints"):
        save(tmp_path, 2, NEW, keep=1)
    assert found(tmp_path) == 2


LAYOUTS = {
    "one large": {"w": torch.ones(1_000_000)},
    "many small": {"state": {f"w{number}": torch.ones(50) for number in range(3000)}},
    "many datasets": {"parameters": {f"w{number}": torch.ones(50) for number in range(3000)}},
    "many groups": {"parameters": {f"g{number}": {"w": torch.ones(20), "note": None} for number in range(1500)}},
    "long text": {f"t{number}": "x" * 100_000 for number in range(30)},
}


def refused(path, tree, remedy):
    """Check, in a child as libhdf5 might crash, that `tree` cannot be saved to `path` and why."""

    def work():
        with pytest.raises(CheckpointError, match=remedy):
            save(path, 2, tree)

    assert in_a_child(work) == 0
    assert found(path) == 1 and sorted(os.listdir(path)) == ["round_00000001.h5", "round_00000001.h5.sha256"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_limit_on_file_size(layout, tmp_path):
    save(tmp_path, 1, OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 5_000, 300_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            refused(tmp_path, LAYOUTS[layout], "ulimit")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_is_really_full(layout, small_disk):
    save(small_disk, 1, OLD)
    refused(small_disk, LAYOUTS[layout], "free some space")


def test_a_disk_that_is_really_read_only(small_disk):
    save(small_disk, 1, OLD)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(small_disk, NEW, "can be written")
