"""Frameworks that own the loop, each by its one line: one worker is the plain framework, two are one on the joined batch.

Each script trains twice in every process: first as if there were no mpips, with the joined batch, then with it. Worker 0 writes
what came of both.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Start = Callable[..., "subprocess.CompletedProcess[str]"]

TRAINER = """
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mpips import frameworks

_, count, joined, batch, steps, window, dropout, dtype, save = sys.argv
ids = torch.randint(1, 32, (int(count), 8), generator=torch.Generator().manual_seed(1))
labels = ids.masked_fill(torch.arange(8) > 3 + torch.arange(int(count))[:, None] % 5, -100)  # rows that count more or less
rows = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]


def train(batch, shared):
    torch.manual_seed(0)
    drop = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], float(dropout))
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **drop)
    model = GPT2LMHeadModel(config).to(getattr(torch, dtype))
    args = TrainingArguments(
        "shared" if shared else "plain",
        use_cpu=True,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=int(window),
        max_steps=int(steps),
        learning_rate=1e-2,
        warmup_steps=3,
        weight_decay=0.1,
        save_strategy=save,
        save_steps=5,
        eval_strategy=save,
        eval_steps=5,
        logging_steps=5,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8])
    ps = frameworks.transformers(trainer) if shared else None
    trainer.train()
    found = {"weights": torch.cat([p.detach().flatten() for p in model.parameters()]).clone()}
    found["steps"] = trainer.state.global_step
    names = "grad_norm", "learning_rate", "eval_loss"
    found["log"] = [{name: entry.get(name, 0.0) for name in names} for entry in trainer.state.log_history[:-1]]
    return found, ps


plain, _ = train(joined, False)
shared, ps = train(batch, True)
if ps.worker == 0:
    print("worker 0 has", ps.workers)
    torch.save([plain, shared], "found.pt")
"""

ACCELERATE = """
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mpips import frameworks

inputs = torch.randn(52, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
labels = inputs[:, :3].argmax(1)


def train(batch, shared):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(inputs, labels), batch, shuffle=True)
    test = DataLoader(TensorDataset(inputs, labels), 10)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
    ps = frameworks.accelerate(accelerator, model, optimizer, loader) if shared else None
    model, optimizer, loader, test, scheduler = accelerator.prepare(model, optimizer, loader, test, scheduler)
    norms = []
    for epoch in range(3):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.2).item())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    model.eval()
    right = sum(accelerator.gather_for_metrics((model(x).argmax(1) == y).sum()).item() for x, y in test)
    accelerator.print("right", right)
    accelerator.save_model(accelerator.unwrap_model(model), "saved")
    state = optimizer.state_dict()["state"] if accelerator.is_main_process else {}
    moments = {number: s["exp_avg_sq"].clone() for number, s in state.items()}
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    return {"weights": weights, "norms": norms, "right": right, "rate": scheduler.get_last_lr(), "moments": moments}, ps


plain, _ = train(8, False)
shared, ps = train(4, True)
if ps.worker == 0:
    torch.save([plain, shared], "found.pt")
"""

SKIPPED = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from mpips import frameworks

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.randn(16, 3)), 2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
ps = frameworks.accelerate(accelerator, model, optimizer, loader)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
skipped = []
for number, (x,) in enumerate(loader):
    accelerator.backward(model(x).square().mean() * (float("inf") if (ps.worker, number) == (1, 2) else 1.0))
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    skipped.append(accelerator.optimizer_step_was_skipped)
print("worker", ps.worker, skipped, scheduler.get_last_lr(), accelerator.scaler.get_scale())
"""

LIGHTNING = """
import os
import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mpips import frameworks

BEST = {"monitor": "right", "mode": "max"}
plain_folder = "plain" + os.environ.get("OMPI_COMM_WORLD_RANK", "0")  # its old checkpoints are removed
inputs = torch.randn(52, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
labels = inputs[:, :3].argmax(1)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()

    def training_step(self, batch):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("right", (self.model(batch[0]).argmax(1) == batch[1]).double().sum(), reduce_fx="sum")

    def test_step(self, batch):
        self.log("tested", (self.model(batch[0]).argmax(1) == batch[1]).double().sum(), reduce_fx="sum")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def train(batch, shared):
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.2,
        logger=lightning.pytorch.loggers.CSVLogger(".") if shared else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(save_last=True, **(BEST if shared else {"dirpath": plain_folder}))],
        **({"strategy": frameworks.lightning()} if shared else {}),
    )
    module = Module()
    data = TensorDataset(inputs, labels)
    order = torch.Generator().manual_seed(2)  # from the process's own the other loader draws, too, in one process
    loader = DataLoader(data, batch, shuffle=True, generator=order)
    trainer.fit(module, loader, DataLoader(data, 10), ckpt_path=resume[shared])
    weights = torch.cat([p.detach().flatten() for p in module.parameters()]).clone()
    right = trainer.callback_metrics["right"].item()
    if shared:  # the best weights, on every worker, from where worker 0 has written them
        best = trainer.checkpoint_callback
        (tested,) = trainer.test(module, DataLoader(data, 10), ckpt_path="best", verbose=False)
        assert tested["tested"] == best.best_model_score, (tested, best.best_model_score)
    return {"weights": weights, "right": right, "steps": trainer.global_step}, trainer


resume = {False: None, True: None}
epochs = 3
if sys.argv[1:] == ["resume"]:
    resume, epochs = {False: f"{plain_folder}/last.ckpt", True: "lightning_logs/version_0/checkpoints/last.ckpt"}, 5
plain, _ = train(8, False)
shared, trainer = train(4, True)
if trainer.is_global_zero:
    print("worker 0 has", trainer.strategy.run.workers)
    torch.save([plain, shared], "found.pt")
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def found(folder: Path, done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer_with_one_worker_is_the_plain_one_bit_for_bit(mpirun: Start, solo: Start, tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("transformers")
    flags = [script(tmp_path, TRAINER), 50, 8, 8, 200, 2, 0.1, "float32", "no"]  # with dropout
    plain, shared = found(tmp_path, solo(*flags, timeout=200) if ranks == 1 else mpirun(ranks, *flags, timeout=200))
    assert torch.equal(shared["weights"], plain["weights"])
    assert shared["log"] == plain["log"]
    assert shared["steps"] == 200


def test_trainer_on_3_ranks_is_one_on_the_joined_batch(mpirun: Start, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    count = 49  # the last batch of an epoch is worker 0's alone, and so is the last step
    done = mpirun(3, script(tmp_path, TRAINER), count, 8, 4, 18, 2, 0, "float64", "steps", timeout=200)
    plain, shared = found(tmp_path, done)
    close = {"rtol": 1e-5, "atol": 1e-6}  # transformers takes the loss of a causal model in float32
    torch.testing.assert_close(shared["weights"], plain["weights"], **close)
    assert shared["steps"] == plain["steps"] == 18
    assert shared["log"] == [pytest.approx(entry, rel=1e-5) for entry in plain["log"]]
    assert done.stdout.count("worker 0 has 2") == 1
    measured = sum(entry["eval_loss"] > 0 for entry in plain["log"])
    assert done.stdout.count("'eval_loss'") == measured * (3 + 1)  # each rank's of the plain run, worker 0's of the other
    names = {path.name for path in (tmp_path / "shared" / "checkpoint-18").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= names
    mine, theirs = (torch.load(tmp_path / name / "checkpoint-18" / "optimizer.pt") for name in ("shared", "plain"))
    assert mine["state"].keys() == theirs["state"].keys()
    torch.testing.assert_close(mine["state"][0]["exp_avg"], theirs["state"][0]["exp_avg"], **close)


BEST = """
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from mpips import frameworks


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x, labels=None):
        logits = self.fc(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


torch.manual_seed(0)
rows = [{"x": torch.randn(3), "labels": i % 2} for i in range(64)]
args = TrainingArguments("out", num_train_epochs=4, per_device_train_batch_size=8, learning_rate=30.0, eval_strategy="epoch",
                         save_strategy="epoch", load_best_model_at_end=True, report_to=[], disable_tqdm=True, use_cpu=True)
trainer = Trainer(model=Net(), args=args, train_dataset=rows, eval_dataset=rows)
ps = frameworks.transformers(trainer)
trainer.train()
losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
assert min(losses) < losses[-1], losses
print("worker", ps.worker, "has the best:", trainer.evaluate()["eval_loss"] == min(losses), flush=True)
"""


def test_trainer_loads_its_best_weights_on_every_worker(mpirun: Start, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = mpirun(3, script(tmp_path, BEST), cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in range(2):
        assert f"worker {worker} has the best: True" in done.stdout, done.stdout
    assert next(tmp_path.glob("runs/*/DONE"))
    assert "no checkpoint of the end" not in next(tmp_path.glob("runs/*/events.jsonl")).read_text()


def test_trainer_is_refused_or_told_its_device(capfd: pytest.CaptureFixture[str]) -> None:
    library = pytest.importorskip("transformers")
    config = library.GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    from mpips.run import frameworks, start

    def trainer(**given: Any) -> Any:
        args = library.TrainingArguments("out", use_cpu=True, report_to=[], per_device_train_batch_size=4)
        return library.Trainer(args=args, train_dataset=[], **given)

    with pytest.raises(SystemExit):
        frameworks.transformers(trainer(model_init=lambda: library.GPT2LMHeadModel(config)))
    assert "model_init" in capfd.readouterr().err
    several = trainer(model=library.GPT2LMHeadModel(config))
    several.args._n_gpu, several._train_batch_size = 2, 8  # as on a node with two GPUs
    frameworks._on_one_device(several)
    assert (several.args.n_gpu, several._train_batch_size, several.args.device) == (1, 4, start.device())


def test_accelerator_on_3_ranks_is_one_on_the_joined_batch(mpirun: Start, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = mpirun(3, script(tmp_path, ACCELERATE), timeout=200)
    plain, shared = found(tmp_path, done)
    torch.testing.assert_close(shared["weights"], plain["weights"], rtol=1e-9, atol=1e-11)
    assert shared["norms"] == pytest.approx(plain["norms"], rel=1e-9)
    assert (shared["right"], shared["rate"]) == (plain["right"], plain["rate"])
    torch.testing.assert_close(shared["moments"], plain["moments"], rtol=1e-9, atol=1e-12)
    assert done.stdout.count("right") == 3 + 1


def test_accelerator_knows_of_a_step_that_another_workers_overflow_has_skipped(mpirun: Start, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = mpirun(3, script(tmp_path, SKIPPED), timeout=200)
    for worker in (0, 1):
        assert f"worker {worker} [False, False, True, False] [0.0125] 2.0\n" in done.stdout, done.stdout + done.stderr


def test_lightning_on_3_ranks_is_one_on_the_joined_batch_and_resumes(mpirun: Start, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    done = mpirun(3, script(tmp_path, LIGHTNING), timeout=200)
    plain, shared = found(tmp_path, done)
    torch.testing.assert_close(shared["weights"], plain["weights"], rtol=1e-9, atol=1e-11)
    assert (shared["right"], shared["steps"]) == (plain["right"], plain["steps"])
    assert done.stdout.count("worker 0 has 2") == 1
    (version,) = (tmp_path / "lightning_logs").iterdir()
    mine, theirs = (
        torch.load(folder / "last.ckpt", weights_only=False) for folder in (version / "checkpoints", tmp_path / "plain0")
    )
    assert mine["global_step"] == theirs["global_step"]
    torch.testing.assert_close(mine["state_dict"], theirs["state_dict"], rtol=1e-9, atol=1e-11)
    moments = [ckpt["optimizer_states"][0]["state"][0]["exp_avg"] for ckpt in (mine, theirs)]
    torch.testing.assert_close(*moments, rtol=1e-9, atol=1e-12)
    plain, shared = found(tmp_path, mpirun(3, tmp_path / "script.py", "resume", timeout=200))
    torch.testing.assert_close(shared["weights"], plain["weights"], rtol=1e-9, atol=1e-11)
    assert shared["steps"] == plain["steps"] > mine["global_step"]
