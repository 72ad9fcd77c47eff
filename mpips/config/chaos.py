"""The setting `chaos`: faults to be made on purpose, as a text.

    kill:rank=2@round=50         rank 2 kills itself in round 50
    stop:rank=1@round=30         rank 1 stops itself in round 30, for good; stop:rank=1@30:20s for 20 s
    delay:rank=3:200ms           rank 3 sleeps so long in each round; delay:rank=3@30:2s in round 30 alone
    enospc@ckpt:2                the disk is full when a second checkpoint is written

Several are separated by commas; `round=` may be left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mpips.config.error import ConfigError, cut

TIME = r"(?P<time>\d{1,6}(?:\.\d{1,6})?)(?P<unit>ms|s|m)"
AT = r"@(?:round=)?(?P<at>\d{1,15})"
FORMS = {
    "kill": re.compile(rf"kill:rank=(?P<rank>\d{{1,9}}){AT}"),
    "stop": re.compile(rf"stop:rank=(?P<rank>\d{{1,9}}){AT}(?::{TIME})?"),
    "delay": re.compile(rf"delay:rank=(?P<rank>\d{{1,9}})(?:{AT})?:{TIME}"),
    "enospc": re.compile(r"enospc@ckpt[:=](?P<at>\d{1,15})"),
}
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
ALLOWED = "kill:rank=R@ROUND, stop:rank=R@ROUND[:TIME], delay:rank=R[@ROUND]:TIME, enospc@ckpt:NUMBER, separated by commas"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        text: as it was given.
        kind: what is done.
        rank: by which rank; of `enospc` the server, 0.
        at: in which round, or at which checkpoint, from 1; 0: in every round.
        seconds: how long; 0 of `stop`: for good.
    """

    text: str
    kind: Literal["kill", "stop", "delay", "enospc"]
    rank: int
    at: int
    seconds: float


def faults(text: str) -> list[Fault]:
    """Return the faults that a text describes.

    Raises:
        ConfigError: one of them is not of a known form.
    """
    return [_fault(part.strip(), text) for part in text.split(",")]


def check_chaos(text: str, size: int) -> None:
    """Raise ConfigError if a fault is of a rank that a run of `size` ranks has not."""
    for fault in faults(text):
        if fault.rank >= size:
            raise ConfigError(f"chaos: given {fault.text!r}, allowed: a rank from 0 to {size - 1}, as there are {size} ranks")


def _fault(part: str, text: str) -> Fault:
    for kind, form in FORMS.items():
        if found := form.fullmatch(part):
            given = found.groupdict()
            seconds = float(given["time"]) * SECONDS[given["unit"]] if given.get("time") else 0.0
            if given.get("at") is not None and int(given["at"]) == 0:
                raise ConfigError(f"chaos: given {cut(part)!r}, allowed: rounds and checkpoints from 1")
            return Fault(part, kind, int(given.get("rank") or 0), int(given.get("at") or 0), seconds)  # type: ignore[arg-type]
    raise ConfigError(f"chaos: given {cut(part or text)!r}, allowed: {ALLOWED}")
