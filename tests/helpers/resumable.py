"""A script for the resume tests: trains on the digits of nothing, slowly enough to be killed, and prints its weights' SHA-256.

resumable.py --optimizer adam --epochs 3 [--die-at ROUND [--die-once]] [mpips flags]
"""

import argparse
import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mpips
from mpips.process.lifecycle import preempted
from tests.helpers.programs import OPTIMIZERS, cnn, data, dropout_mlp, sha

parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=["cnn", "dropout"], default="cnn")
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--samples", type=int, default=330)
parser.add_argument("--die-at", type=int, default=-1, help="SIGKILL to this rank after so many rounds")
parser.add_argument("--die-rank", type=int, default=0)
parser.add_argument("--die-once", action="store_true", help="not if a file says that this rank has died")
parser.add_argument("--preempt-at", type=int, default=-1, help="SIGUSR1 to this rank after so many rounds or soon after")
mpips.add_arguments(parser)
args = parser.parse_args()

torch.set_num_threads(1)
model = cnn() if args.model == "cnn" else dropout_mlp()
optimizer = OPTIMIZERS[args.optimizer](model.parameters())
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))

ps = mpips.connect(model, optimizer, checkpoint={"every": 4})
for _ in ps.epochs(args.epochs):
    for x, y in ps.batches(data(args.samples), 16):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        ps.step(loss)
        scheduler.step()
        if ps.round == args.die_at and rank == args.die_rank and not (args.die_once and Path("died").exists()):
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 <= args.preempt_at <= ps.round and rank == args.die_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not preempted():  # a thread takes it
                time.sleep(0.001)
    ps.validate(lambda: 0.1 * ps.round)
ps.print("weights", sha(model))
