"""The update: what a worker computes between pull and push.

An update is told of each step of the script and says when a push is due. It then fills the push message: the body with its
contribution times a weight, the tail with this rank's row. Contributions are sums, so empty shards and uneven batches need no
protocol of their own. Federated modes, in which clients take local steps, are in `federated.py`, elastic averaging is in
`easgd.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mpips.config import Config
from mpips.model.message import Control, Replica, WorkerStatus
from mpips.optim.flat_optimizer import FlatOptimizer


class Gradient:
    """The gradient of the mean loss over the samples of one step.

    Args:
        replica: the model's flat buffers and its messages.
        rank: this rank.
        index, workers: this worker's number, from 0, and the number of workers.
        config: the settings.
        inner: the worker's own optimizer; None in modes without local steps.

    Attributes:
        index, workers: see above; of the workers that live, from the next loop on.
        at_connect: the same, of all workers.
        pending: whether there are local steps, or a failure, that have not been pushed. Gradients do not count.
        here: whether the server is on this rank and shares the replica.
    """

    pending: bool = False
    here: bool = False
    wants_weights: ClassVar[bool] = True  # whether the answer to a push is to bring the server's weights
    apart: ClassVar[bool] = False  # whether the model's weights differ from the server's between rounds
    members: frozenset[int] | None = None  # the parameters that the round steps; None for all
    lead: bool | None = None  # if all workers have the same contribution: whether this worker's counts; else None
    averages: bool = False  # whether the contribution is for an average without a step
    raw: ClassVar[bool] = True  # whether a push is one contribution, whose weight the reduction may apply

    def __init__(
        self,
        replica: Replica,
        rank: int,
        index: int,
        workers: int,
        config: Config | None = None,
        inner: FlatOptimizer | None = None,
    ) -> None:
        self.replica, self.rank, self.index, self.workers = replica, rank, index, workers
        self.at_connect = index, workers
        self.first, self.alone = index == 0, workers == 1
        self.config, self.inner = config or Config(), inner

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """Take note of one step of the script: backward has left the gradient of the mean `loss` over `samples`.

        Returns:
            Whether a push is due now.
        """
        return True

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Fill the push message. Sets the row's `weight` and `bad`, and sets samples and loss to 0 in a bad row.

        A single worker's weight is 1 rather than its samples: (n g) / n would differ from g in the last bit.
        """
        flat, push = self.replica.flat, self.replica.push
        present = flat.collect()
        if not self.replica.wire_is_grad and not self.replica.handed:
            push.gradients.copy_(flat.grad)
        self.replica.handed = False
        metrics = self._check_finite(row, metrics)
        row.weight = row.steps = self.weigh(row.samples)
        push.clear_behind()
        if self.replica.buffers.names:
            self.replica.buffers.write(push.floats, push.limbs, row.weight, self.first)
        if row.weight:
            push.write_presence(present)
            if row.weight != 1 and not push.raw:
                push.gradients.mul_(row.weight)
        elif not push.shared:
            push.body.zero_()
        push.write(self.rank, row, metrics)

    def weigh(self, samples: float) -> float:
        """Return the contribution's weight. A subclass may scale the contribution in the push message here."""
        if self.lead is not None:
            return float(self.lead)
        return float(samples > 0) if self.alone or self.config.reduction == "sum" else samples

    def _check_finite(self, row: WorkerStatus, metrics: Sequence[float]) -> Sequence[float]:
        """Mark the row if the contribution is not finite; return the metrics, zeroed along with the row's loss in that case.

        In shared memory the reduction finds out at no cost, so the contribution is examined here only if the rule is not the
        mean, or if a contribution that is not finite is to be dropped. Nobody examines an average without a step: in the mean
        the contribution counts as it is, since the next step may be about other parameters than those that are not finite.
        """
        if row.overflow:  # no rank steps
            return metrics
        found_by_sum = self.replica.push.shared and self.config.rule == "mean" and not self.averages
        if found_by_sum and self.config.nonfinite != "drop":
            return metrics
        bad = self.replica.flat.first_nonfinite(self.replica.push.gradients)
        if bad is None:
            return metrics
        row.bad = 1 + bad
        if self.averages and self.config.rule == "mean" and self.config.nonfinite != "drop":
            return metrics
        row.samples, row.loss = 0, 0
        return [0.0] * len(metrics)

    def write_nothing(self, row: WorkerStatus, metrics: int) -> None:
        """Fill the push message of a rank without data. Gradients that have not been pushed are kept.

        Args:
            row: this rank's row.
            metrics: the number of extra metrics.
        """
        push = self.replica.push
        push.forget()
        self.replica.buffers.write(push.floats, push.limbs, 0, self.first)
        push.write(self.rank, row, [0.0] * metrics)

    def received(self) -> None:
        """React to the server's new weights, in the pull message."""

    def park(self) -> None:
        """Put the server's weights into the model, at the end of a loop."""

    def unpark(self) -> None:
        """Put the worker's own weights back into the model, at the beginning of a loop."""

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's own state for a checkpoint: nested dicts of tensors, numbers and texts."""
        return {}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class LocalSteps(Gradient):
    """Local steps: a worker pushes the change of its weights, or the weights themselves where the server only averages.

    The server's weights are kept as the anchor, in shared memory where the ranks of the node share the pull message. After
    `write` the model is back at the anchor, unless the model has memory of its own. So a server on this rank steps from the
    anchor, and a round whose step is not taken changes nothing.
    """

    inner: FlatOptimizer
    apart = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = 1  # local steps between two rounds; set by `make_update`
        self.takes_weights = False
        self._anchor: Tensor | None = None
        self._taken = 0  # local steps since the last round
        self._bad: int | None = None

    @property
    def anchor(self) -> Tensor:
        """The server's weights, `(numel,)`, in the model's dtype or the message's."""
        if self.replica.apart:
            return self.replica.pull.weights
        if self._anchor is None:
            self._anchor = self.replica.push.gradients.new_zeros(self.replica.flat.numel)
        return self._anchor

    @property
    def pending(self) -> bool:  # type: ignore[override]
        """Whether there are local steps that have not been pushed."""
        return self._taken > 0 or self._bad is not None

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """Take one local step of the worker's optimizer, unless the gradient is not finite; see `Gradient.step`."""
        flat, push = self.replica.flat, self.replica.push
        if samples:
            present = flat.collect()
            if not self.replica.wire_is_grad:
                push.gradients.copy_(flat.grad)
            bad = flat.first_nonfinite(push.gradients)
            if bad is None:
                self.correct()
                self.inner.step(present, self.config.clip)
                self._taken += 1
            else:
                self._bad = bad
        flat.spend()
        return self._bad is not None or self.due(control)

    def due(self, control: Control) -> bool:
        """Return whether a round is due after the local step just taken."""
        return self._taken >= (1 if control.round < self.config.local.after else self.steps)

    def correct(self) -> None:
        """Modify the gradient in the push message before a local step."""

    def weigh(self, samples: float) -> float:
        """Return the contribution's weight. With `local.weights=uniform` it is 1 for every worker that has samples."""
        weight = super().weigh(samples)
        return float(weight > 0) if self.config.local.weights == "uniform" else weight

    def compose(self, samples: float) -> tuple[float, float]:
        """Write the contribution times its weight to the push message's body.

        The whole gradient part is written; the rest of the message is zero before the call.

        Returns:
            The weight, and the number of local steps.
        """
        push, whole = self.replica.push, self.inner.whole
        if self.takes_weights:
            push.gradients.copy_(whole)
        else:
            push.gradients.copy_(self.anchor).sub_(whole)
        weight = self.weigh(samples)
        self.replica.buffers.write(push.floats, push.limbs, weight, self.first)
        if weight != 1 and not push.raw:
            push.gradients.mul_(weight)
        steps, self._taken = self._taken, 0
        return weight, steps

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Fill the push message, and return the model to the anchor; see `Gradient.write`."""
        self.replica.push.clear_behind()
        row.weight, steps = self.compose(row.samples)
        row.steps = row.weight * steps
        if not self.replica.apart:
            self.go_back()
        self.seal(row, metrics)

    def go_back(self) -> None:
        """Copy the anchor to the model's weights."""
        self.replica.flat.weights.copy_(self.anchor)
        self.inner.refresh()

    def seal(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Check that the composed body is finite, and write the tail."""
        push, self._bad, bad = self.replica.push, None, self._bad
        metrics = self._check_finite(row, metrics)
        if bad is not None:
            row.bad, row.samples, row.loss, metrics = 1 + bad, 0, 0, [0.0] * len(metrics)
        if row.bad:
            row.weight = row.steps = 0
        if row.weight:
            push.presence.fill_(1)
        elif push.shared:
            push.statistics.zero_()
        else:
            push.body.zero_()
        push.write(self.rank, row, metrics)

    def received(self) -> None:
        """Bring model and anchor to the server's new weights; see `Gradient`."""
        if self.replica.apart:
            self.replica.flat.weights.copy_(self.anchor)
        else:
            self.anchor.copy_(self.replica.flat.weights)
        self.inner.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the worker's optimizer. Between rounds its weights are the server's, so they are not saved."""
        return {"inner": self.inner.state_dict() | {"masters": {}}}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore the state of the worker's optimizer; see `Gradient`."""
        if "inner" in tree:
            self.inner.load_state_dict(tree["inner"])
