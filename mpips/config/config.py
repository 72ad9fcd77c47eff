"""The tree of settings. To add one, add a line here or in its group: a default, its help, and a check of what is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any, Literal

import yaml

from mpips.config.chaos import faults
from mpips.config.error import check
from mpips.config.groups import Checkpointing, Clients, EarlyStopping, Local, Outer, Robust, Staleness

TAKEN = (  # names that a metric cannot have: they are columns of the messages and of the report
    *("samples", "weight", "loss", "bad", "done", "stop", "signal", "round", "train", "wait", "steps", "tickets", "want"),
    *("call", "begun", "digest", "drawn", "which", "adopt", "overflow", "more", "stepped"),
    *("epoch", "version", "lr", "time", "event", "rank", "ranks", "epochs", "samples_per_s", "self"),
    *("null", "true", "false"),  # YAML writes these in quotes
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run. `mpips.add_arguments` adds the settings to a script's own flags."""

    mode: str = field(default="sync", metadata={"help": "how workers and server take turns: sync, async, local_sgd ..."})
    backup_workers: int = field(default=0, metadata={"help": "sync: do not wait for the last so many; late ones are left out"})
    overlap: bool = field(
        default=False,
        metadata={
            "help": "compute while updates travel: the next one (async, ssp), or the rest of backward (sync on several nodes)"
        },
    )
    rule: str = field(default="mean", metadata={"help": "how contributions are combined"})
    deterministic: bool = field(
        default=False, metadata={"help": "the same bits from any MPI library, algorithm and placement (Gather, not Reduce)"}
    )
    server_trains: bool = field(default=False, metadata={"help": "rank 0 also trains, so that no GPU serves alone"})
    buffers: Literal["mean", "server", "local"] = field(
        default="mean", metadata={"help": "BatchNorm statistics and other buffers: combined, rank 0's, or each rank's own"}
    )
    nonfinite: Literal["raise", "drop", "skip"] = field(
        default="raise", metadata={"help": "a NaN or Inf update: end the run, leave that worker out, or skip the round"}
    )
    reduction: Literal["mean", "sum"] = field(
        default="mean",
        metadata={"help": "sync: what the script's loss is of its batch; gradients are combined alike"},
    )
    clip: float | None = field(default=None, metadata={"help": "the combined gradient's largest global norm"})
    metrics: tuple[str, ...] = field(default=(), metadata={"help": "names of the extra metrics given to step()"})
    seed: int = field(default=0, metadata={"help": "which clients train in a round, and their orders"})
    bucket_cap_mb: float = field(default=16.0, metadata={"help": "largest single message, in MB (10^6 bytes)"})
    shared_memory: bool = field(default=True, metadata={"help": "ranks of a node share weights and gradients in memory"})
    ranks_per_node: int = field(
        default=0, metadata={"help": "at most so many neighbours share memory, as if the others were on other nodes; 0: all"}
    )
    comm_dtype: str = field(
        default="full",
        metadata={"help": "between nodes: float32 in full, or bfloat16, added in float32; plan sharded"},
    )
    plan: Literal["auto", "root", "sharded"] = field(
        default="auto", metadata={"help": "who steps: rank 0, each rank its slice of the weights, or whichever is faster"}
    )
    cuda_aware: bool = field(default=False, metadata={"help": "hand device pointers to MPI; only for a CUDA-aware MPI"})
    run_dir: str | None = field(default=None, metadata={"help": "the run's folder; default runs/<time>-<script>"})
    resume: str = field(
        default="no",
        metadata={
            "help": "no, auto (the newest checkpoint, if any), aside (no, and rename what is in run_dir), or a file or folder"
        },
    )
    deadline: float = field(
        default=0.0,
        metadata={"help": "seconds to wait for a rank that all others wait for, before the run ends; 0: for ever"},
    )
    min_workers: int = field(
        default=0,
        metadata={"help": "go on without workers that die while so many live (with mpips run --ft); 0: a death ends the run"},
    )
    chaos: str | None = field(
        default=None,
        metadata={
            "help": "faults made on purpose: kill:rank=2@round=50, stop:rank=1@30:20s, delay:rank=3:200ms, enospc@ckpt:2"
        },
    )
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    staleness: Staleness = field(default_factory=Staleness)
    local: Local = field(default_factory=Local)
    outer: Outer = field(default_factory=Outer)
    clients: Clients = field(default_factory=Clients)
    robust: Robust = field(default_factory=Robust)

    def __post_init__(self) -> None:
        check("backup_workers", self.backup_workers, "a whole number, 0 or more", self.backup_workers >= 0)
        check("clip", self.clip, "a number above 0", self.clip is None or 0 < self.clip < math.inf)
        free = [name for name in self.metrics if name.isidentifier() and not iskeyword(name) and name not in TAKEN]
        good = free == list(dict.fromkeys(self.metrics))
        check("metrics", list(self.metrics), f"different Python names, none of {', '.join(TAKEN)}", good)
        check("seed", self.seed, "a whole number from -2^53 to 2^53", abs(self.seed) <= 2**53)
        check("bucket_cap_mb", self.bucket_cap_mb, "a number from 0.001 to 1000", 0.001 <= self.bucket_cap_mb <= 1000)
        check("ranks_per_node", self.ranks_per_node, "a whole number, 0 or more", self.ranks_per_node >= 0)
        check("resume", self.resume, "no, auto, aside, or a path", self.resume != "" and "\0" not in self.resume)
        check("min_workers", self.min_workers, "a whole number, 0 or more", self.min_workers >= 0)
        check("deadline", self.deadline, "0, or a number from 1", self.deadline == 0 or 1 <= self.deadline < math.inf)
        if self.chaos is not None:
            faults(self.chaos)
        check(
            "run_dir",
            self.run_dir,
            "a path, or null",
            self.run_dir is None or (self.run_dir != "" and "\0" not in self.run_dir),
        )

    def settings(self) -> dict[str, Any]:
        """Return every setting by its dotted key, in a fixed order."""
        return dict(flatten(dataclasses.asdict(self)))

    def yaml(self) -> str:
        """Return the tree as a YAML file that `--config` accepts."""
        tree = dataclasses.asdict(self) | {"metrics": list(self.metrics)}
        return yaml.safe_dump(tree, sort_keys=False)


GROUPS = tuple(f.name for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING)


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a nested tree by dotted key."""
    for key, value in tree.items():
        if key in GROUPS and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", below) for name, below in value.items())
        else:
            yield key, value
