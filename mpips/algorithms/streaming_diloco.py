"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): the parameters travel a fragment at a time, and lag behind.

The model is cut into `local.fragments` P of whole parameters. A round is due every H / P local steps, rounded up, and brings
one fragment together, round r that of number r mod P; so each does about every H steps. The server's step leaves the others,
and their momentum, as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mpips.algorithms.update import LocalSteps
from mpips.config import Config, ConfigError
from mpips.model.message import WorkerStatus


def cycle(config: Config, steps: int) -> int:
    """Local steps between two rounds, if there are to be `steps` (H) between two of the same fragment.

    Raises:
        ConfigError: a fragment would be sent anew before what came of it is taken up.
    """
    local = config.local
    between = -(-steps // local.fragments)
    if 0 < local.delay >= between * local.fragments:
        allowed = f"less than {between * local.fragments}, the local steps between two rounds of a fragment"
        raise ConfigError(f"local.delay: given {local.delay}, allowed: {allowed}")
    return between


class Streaming(LocalSteps):
    """Algorithm 2: theta_i <- mix theta_i + (1 - mix) theta on a fragment, `delay` local steps after its round.

    A worker's weights stay its own from round to round. Every rank takes every round's fragment, so the anchor equals the
    server's weights at all times; what is pushed is the way from there. The model holds the server's weights, and `_own` the
    worker's, during a round and outside the loops.

    Where a round comes early, at a shard's end, a fragment may come again before its last result was taken up: that is then
    done with the newer one, at the time of the older. Time stands still for a worker whose shard is exhausted.
    """

    def __init__(self, *seat: Any, **named: Any) -> None:
        super().__init__(*seat, **named)
        self._own = torch.zeros_like(self.replica.push.gradients)
        self._parked = False
        self._due: dict[int, int] = {}  # fragment -> local steps until what came of it is taken up
        self._at = math.inf  # the round that this worker takes part in
        self._samples = [0.0] * len(self.replica.fragments)  # behind what each of them would send now

    def step(self, *given: Any) -> bool:
        """See `LocalSteps`."""
        taken = self._taken
        due = super().step(*given)
        if self._taken > taken:
            self._due = {fragment: steps - 1 for fragment, steps in self._due.items()}
            self._take_up()
        return due

    def _take_up(self) -> None:
        """Take up the fragments for which it is time."""
        whole, mix = self._own if self._parked else self.inner.whole, self.config.local.mix
        for fragment in [fragment for fragment, steps in self._due.items() if steps <= 0]:
            del self._due[fragment]
            span = self.replica.fragments[fragment].span
            own, new = whole[span], self.anchor[span]
            if mix:
                own.mul_(mix).add_(new, alpha=1 - mix)
            else:
                own.copy_(new)
            if not self._parked:
                self._show(span)

    def _show(self, span: slice) -> None:
        """Let the model have the worker's weights, where it does not share their memory."""
        if not self.replica.wire_is_grad:
            self.replica.flat.weights[span].copy_(self.inner.whole[span])

    def park(self) -> None:
        """The server's weights into the model, on every rank; the worker's are kept apart."""
        if not self._parked:
            self._own.copy_(self.inner.whole)
            self.replica.flat.weights.copy_(self.anchor)
            self.inner.refresh()
            self._parked = True

    def unpark(self) -> None:
        """The worker goes on with its own weights."""
        if self._parked:
            self.inner.whole.copy_(self._own)
            self._show(self.replica.push.span)
            self._parked = False

    def _begin(self) -> int:
        """The fragment that the round to come is about."""
        self._at = self.replica.pull.control.round
        return int(self._at) % len(self.replica.fragments)

    def _end(self) -> None:
        """What came of the round is to be taken up; a round is not counted, and brings nothing, in which all only wait."""
        if self.replica.pull.control.round > self._at:
            self._due.setdefault(int(self._at) % len(self.replica.fragments), self.config.local.delay)
            self._at = math.inf

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """See `Gradient.write`; a worker that is not finite goes on from the server's weights."""
        self._samples = [samples + row.samples for samples in self._samples]
        super().write(row, metrics)
        if row.bad:
            self._own.copy_(self.anchor)
            self._due.clear()
            self._samples = [0.0] * len(self._samples)

    def compose(self, samples: float) -> tuple[float, float]:
        """See `LocalSteps`; the weight is the samples since this fragment was last sent."""
        fragment = self._begin()
        samples, self._samples[fragment] = self._samples[fragment], 0.0
        self._own.copy_(self.inner.whole)
        self._parked = True
        return super().compose(samples)

    def write_nothing(self, row: WorkerStatus, metrics: int) -> None:
        """See `Gradient`; what the others make of the fragment is taken up here, too."""
        self.park()
        super().write_nothing(row, metrics)
        self._begin()

    def received(self) -> None:
        """The first weights are the server's; later a fragment of them has landed among the others."""
        super().received()
        self._end()
        if self._parked:
            self._take_up()
            if not self.replica.pull.control.stop:
                self.unpark()

    def state_dict(self) -> dict[str, Any]:
        """The worker's optimizer, its own weights, and what it is yet to take up and to send."""
        self._end()
        own = self._own if self._parked else self.inner.whole
        return super().state_dict() | {
            "weights": dict(self.replica.flat.named(own)),
            "due": {str(fragment): steps for fragment, steps in self._due.items()},
            "samples": {str(fragment): samples for fragment, samples in enumerate(self._samples)},
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """See `Gradient`; a worker that is new begins at the server's weights."""
        super().load_state_dict(tree)
        if "weights" not in tree:
            return
        for name, view in self.replica.flat.named(self._own):
            view.copy_(tree["weights"][name])
        self._parked = True
        if len(tree["samples"]) == len(self._samples):  # else the run is cut otherwise from now on
            self._due = {int(fragment): int(steps) for fragment, steps in tree["due"].items()}
            self._samples = [float(tree["samples"][str(fragment)]) for fragment in range(len(self._samples))]
        self._take_up()
