"""The groups of settings; each is a branch of the tree `Config`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from mpips.config.error import check


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """When checkpoints are written, and how many are kept."""

    every: int | str = field(
        default=0, metadata={"help": "also after so many rounds, or seconds, as 30s; 0: at the end of epochs only"}
    )
    keep: int = field(default=3, metadata={"help": "the newest so many stay on disk"})
    epochs: int = field(default=1, metadata={"help": "at the end of each so many epochs, and of the last; 0: of the last only"})

    def __post_init__(self) -> None:
        good = self.seconds > 0 if isinstance(self.every, str) else self.every >= 0
        check("checkpoint.every", self.every, "a whole number, 0 or more, or seconds, as 30s", good)
        check("checkpoint.epochs", self.epochs, "a whole number, 0 or more", self.epochs >= 0)
        check("checkpoint.keep", self.keep, "a whole number, 1 or more", self.keep >= 1)

    @property
    def rounds(self) -> int:
        """The rounds from one checkpoint to the next; 0 if their number does not matter."""
        return self.every if isinstance(self.every, int) else 0

    @property
    def seconds(self) -> int:
        """The seconds from one checkpoint to the next; 0 if the time does not matter."""
        found = isinstance(self.every, str) and re.fullmatch(r"([0-9]{1,9})s", self.every)
        return int(found[1]) if found else 0


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When the server ends the run early, judged by the value that `validate` returns."""

    patience: int = field(default=0, metadata={"help": "stop after so many validations without a gain; 0: never"})
    min_delta: float = field(default=0.0, metadata={"help": "a smaller gain over the best value does not count"})
    target: float | None = field(default=None, metadata={"help": "stop once the value is at least this good"})
    monitor: str | None = field(default=None, metadata={"help": "the name of the value that decides; the first validated"})
    mode: Literal["max", "min"] = field(default="max", metadata={"help": "whether a larger or a smaller value is better"})

    def __post_init__(self) -> None:
        check("early_stopping.patience", self.patience, "a whole number, 0 or more", self.patience >= 0)
        check("early_stopping.min_delta", self.min_delta, "a number, 0 or more", 0 <= self.min_delta < math.inf)
        check("early_stopping.target", self.target, "a number or null", self.target is None or math.isfinite(self.target))


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """How an asynchronous server treats late contributions. null selects the mode's own value."""

    policy: Literal["none", "reject", "inverse", "poly", "hinge", "dc", "dc-adaptive"] | None = field(
        default=None, metadata={"help": "of a late contribution: take it, reject it, take it scaled, or compensated (DC-ASGD)"}
    )
    bound: int = field(
        default=4, metadata={"help": "ssp: clocks that a worker may be ahead; reject, hinge: versions it may be late"}
    )
    power: float = field(default=0.5, metadata={"help": "poly: (1 + staleness) to minus this; hinge: its slope"})
    strength: float | None = field(default=None, metadata={"help": "dc: lambda, null: 0.04; dc-adaptive: lambda_0, null: 2"})
    buffer: int | None = field(default=None, metadata={"help": "contributions that make one server update (fedbuff's K)"})

    def __post_init__(self) -> None:
        check("staleness.bound", self.bound, "a whole number, 0 or more", self.bound >= 0)
        check("staleness.power", self.power, "a number, 0 or more", 0 <= self.power < math.inf)
        check("staleness.strength", self.strength, "a number, 0 or more, or null", 0 <= (self.strength or 0) < math.inf)
        check("staleness.buffer", self.buffer, "a whole number, 1 or more, or null", self.buffer is None or self.buffer >= 1)


@dataclass(frozen=True, kw_only=True)
class Local:
    """The local steps that a worker takes between two rounds. null selects the mode's own value."""

    steps: int | None = field(default=None, metadata={"help": "so many local steps between two rounds (H, tau)"})
    after: int = field(default=0, metadata={"help": "post-local SGD: one step a round for so many rounds first"})
    weights: Literal["samples", "uniform"] = field(
        default="samples", metadata={"help": "what a worker or client counts in the mean: its samples, or as much as any"}
    )
    moving_rate: float | None = field(default=None, metadata={"help": "easgd: alpha; null: 0.9 / workers"})
    fragments: int = field(default=1, metadata={"help": "diloco, slowmo: send one of so many fragments at a time (streaming)"})
    delay: int = field(default=0, metadata={"help": "with fragments: local steps until a fragment's result is taken up"})
    mix: float = field(
        default=0.0, metadata={"help": "with fragments: share of the local weights kept when a result is taken up"}
    )

    def __post_init__(self) -> None:
        check("local.steps", self.steps, "a whole number, 1 or more, or null", self.steps is None or self.steps >= 1)
        check("local.after", self.after, "a whole number, 0 or more", self.after >= 0)
        ok = self.moving_rate is None or 0 <= self.moving_rate <= 1
        check("local.moving_rate", self.moving_rate, "a number from 0 to 1, or null", ok)
        check("local.fragments", self.fragments, "a whole number, 1 or more", self.fragments >= 1)
        check("local.delay", self.delay, "a whole number, 0 or more", self.delay >= 0)
        check("local.mix", self.mix, "a number from 0 to less than 1", 0 <= self.mix < 1)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The server's optimizer, in modes where the workers step with the script's. null selects the mode's own value."""

    lr: float | None = field(default=None, metadata={"help": "learning rate"})
    momentum: float | None = field(default=None, metadata={"help": "momentum; beta_1 of fedadam, fedyogi, fedadagrad"})
    beta2: float = field(default=0.99, metadata={"help": "fedadam, fedyogi: decay of the second moment"})
    tau: float = field(default=1e-3, metadata={"help": "fedadam, fedyogi, fedadagrad: their degree of adaptivity"})

    def __post_init__(self) -> None:
        check("outer.lr", self.lr, "a number above 0, or null", self.lr is None or 0 < self.lr < math.inf)
        check("outer.momentum", self.momentum, "a number from 0 to less than 1, or null", 0 <= (self.momentum or 0) < 1)
        check("outer.beta2", self.beta2, "a number from 0 to less than 1", 0 <= self.beta2 < 1)
        check("outer.tau", self.tau, "a number above 0", 0 < self.tau < math.inf)


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Federated training: an epoch is one round, in which some of the clients train, hosted by the workers."""

    fraction: float = field(default=1.0, metadata={"help": "share of the clients in a round (C); at least one takes part"})
    epochs: int = field(default=1, metadata={"help": "a client's epochs in a round (E)"})
    mu: float = field(default=0.01, metadata={"help": "fedprox: weight of the proximal term"})
    q: float = field(default=1.0, metadata={"help": "qfedavg: 0 is the plain mean, more is fairer"})

    def __post_init__(self) -> None:
        check("clients.fraction", self.fraction, "a number from 0 to 1", 0 <= self.fraction <= 1)
        check("clients.epochs", self.epochs, "a whole number, 1 or more", self.epochs >= 1)
        check("clients.mu", self.mu, "a number, 0 or more", 0 <= self.mu < math.inf)
        check("clients.q", self.q, "a number, 0 or more", 0 <= self.q < math.inf)


@dataclass(frozen=True, kw_only=True)
class Robust:
    """The assumptions of the rules that tolerate faulty workers."""

    num_byzantine: int = field(default=1, metadata={"help": "faulty contributions to withstand (f)"})
    clip_radius: float = field(default=1.0, metadata={"help": "cclip, normclip: the largest norm that counts in full"})
    iterations: int = field(default=8, metadata={"help": "rfa, cclip: iterations"})

    def __post_init__(self) -> None:
        check("robust.num_byzantine", self.num_byzantine, "a whole number, 0 or more", self.num_byzantine >= 0)
        check("robust.clip_radius", self.clip_radius, "a number above 0", 0 < self.clip_radius < math.inf)
        check("robust.iterations", self.iterations, "a whole number, 1 or more", self.iterations >= 1)
