"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): each round combines one fragment of the parameters.

The model is cut into P = `local.fragments` fragments of whole parameters. A round is due every H / P local steps, rounded up,
and round r combines fragment r mod P. So each fragment takes part about every H steps. The server's step leaves the other
fragments, and their momentum, unchanged. Workers apply the result of a round `local.delay` local steps later.
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
    """Return the local steps between two rounds, given `steps` (H), the local steps between two rounds of the same fragment.

    Raises:
        ConfigError: `local.delay` is so long that a fragment would be sent again before its last result is applied.
    """
    local = config.local
    between = -(-steps // local.fragments)
    if 0 < local.delay >= between * local.fragments:
        allowed = f"less than {between * local.fragments}, the local steps between two rounds of a fragment"
        raise ConfigError(f"local.delay: given {local.delay}, allowed: {allowed}")
    return between


class Streaming(LocalSteps):
    """Algorithm 2: theta_i <- mix theta_i + (1 - mix) theta on a fragment, `delay` local steps after its round.

    A worker's weights stay its own from round to round. Every rank receives every round's fragment, so the anchor always equals
    the server's weights, and a worker pushes the difference to the anchor. During a round and outside the loops the model holds
    the server's weights, and `_own` the worker's.

    At the end of a shard a round comes early. If a fragment is sent again before its previous result was applied, the newer
    result is applied at the time due for the older one. Local steps do not count down on a worker without data.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own = torch.zeros_like(self.replica.push.gradients)
        self._parked = False
        self._due: dict[int, int] = {}  # fragment -> local steps until its result is applied
        self._at = math.inf  # the round in progress
        self._samples = [0.0] * len(self.replica.fragments)  # of each fragment, samples since it was last sent

    def step(self, *given: Any) -> bool:
        """Take a local step, then apply the results that have become due; see `LocalSteps`."""
        taken = self._taken
        due = super().step(*given)
        if self._taken > taken:
            self._due = {fragment: steps - 1 for fragment, steps in self._due.items()}
            self._take_up()
        return due

    def _take_up(self) -> None:
        """Mix the results of the due fragments into the worker's weights."""
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
        """Copy the worker's master weights to the model, if a 16-bit model has them."""
        if not self.replica.wire_is_grad:
            self.replica.flat.weights[span].copy_(self.inner.whole[span])

    def park(self) -> None:
        """Put the server's weights into the model, and keep the worker's weights apart."""
        if not self._parked:
            self._own.copy_(self.inner.whole)
            self.replica.flat.weights.copy_(self.anchor)
            self.inner.refresh()
            self._parked = True

    def unpark(self) -> None:
        """Put the worker's own weights back into the model."""
        if self._parked:
            self.inner.whole.copy_(self._own)
            self._show(self.replica.push.span)
            self._parked = False

    def _begin(self) -> int:
        """Note the coming round, and return the index of its fragment."""
        self._at = self.replica.pull.control.round
        return int(self._at) % len(self.replica.fragments)

    def _end(self) -> None:
        """Schedule the round's result, if the round took place. A round in which all ranks only wait is not counted."""
        if self.replica.pull.control.round > self._at:
            self._due.setdefault(int(self._at) % len(self.replica.fragments), self.config.local.delay)
            self._at = math.inf

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Fill the push message; see `Gradient.write`. A worker that is not finite restarts from the server's weights."""
        self._samples = [samples + row.samples for samples in self._samples]
        super().write(row, metrics)
        if row.bad:
            self._own.copy_(self.anchor)
            self._due.clear()
            self._samples = [0.0] * len(self._samples)

    def compose(self, samples: float) -> tuple[float, float]:
        """Write the contribution; see `LocalSteps`. The weight is the samples since this fragment was last sent."""
        fragment = self._begin()
        samples, self._samples[fragment] = self._samples[fragment], 0.0
        self._own.copy_(self.inner.whole)
        self._parked = True
        return super().compose(samples)

    def write_nothing(self, row: WorkerStatus, metrics: int) -> None:
        """Take part in the round without data; see `Gradient`. The fragment's result is applied on this worker, too."""
        self.park()
        super().write_nothing(row, metrics)
        self._begin()

    def received(self) -> None:
        """Begin at the server's weights; in later calls schedule and apply the fragment that has arrived."""
        super().received()
        self._end()
        if self._parked:
            self._take_up()
            if not self.replica.pull.control.stop:
                self.unpark()

    def state_dict(self) -> dict[str, Any]:
        """Return the worker's optimizer and weights, and for each fragment the pending result and the samples not yet sent."""
        self._end()
        own = self._own if self._parked else self.inner.whole
        return super().state_dict() | {
            "weights": dict(self.replica.flat.named(own)),
            "due": {str(fragment): steps for fragment, steps in self._due.items()},
            "samples": {str(fragment): samples for fragment, samples in enumerate(self._samples)},
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore the worker's state. A worker without saved state begins at the server's weights. See `Gradient`."""
        super().load_state_dict(tree)
        if "weights" not in tree:
            return
        for name, view in self.replica.flat.named(self._own):
            view.copy_(tree["weights"][name])
        self._parked = True
        if len(tree["samples"]) == len(self._samples):  # else the number of fragments has changed
            self._due = {int(fragment): int(steps) for fragment, steps in tree["due"].items()}
            self._samples = [float(tree["samples"][str(fragment)]) for fragment in range(len(self._samples))]
        self._take_up()
