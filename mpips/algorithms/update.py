"""What a worker computes between pull and push: the update.

An update takes note of each step of the script and says when a push is due; then it fills the push message: the body with its
contribution times a weight, the tail with this rank's row. Contributions are sums, so that empty shards and uneven batches need
no protocol of their own. Modes in which clients take their own steps are in `federated.py`, elastic averaging in `easgd.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mpips.config import Config
from mpips.model.message import Control, Replica, WorkerStatus
from mpips.optim.flat_optimizer import FlatOptimizer


class Gradient:
    """The gradient of the mean loss over this step's samples.

    Args:
        replica: where the gradient accumulated and where it goes.
        rank: this rank.
        index, workers: this worker's number, from 0, and how many there are.
        config: the settings.
        inner: the worker's own optimizer; None where it takes no steps of its own.

    Attributes:
        pending: whether there is work that has not been pushed, besides gradients.
        here: whether the server is on this rank and shares the replica.
    """

    pending: bool = False
    here: bool = False
    pulls_first: ClassVar[bool] = False  # whether the server's weights are needed before a push that is due
    wants_weights: ClassVar[bool] = True  # whether they are, in answer to a push
    apart: ClassVar[bool] = False  # whether the model is not at the server's weights all the time
    members: frozenset[int] | None = None  # the parameters that the round is about, if not all
    lead: bool | None = None  # of a contribution that all workers have alike: whether it is this one's that counts
    raw: ClassVar[bool] = True  # whether a push is one contribution, that may be weighted where it is combined

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
        self.first, self.alone = index == 0, workers == 1
        self.config, self.inner = config or Config(), inner

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """The script has taken a step: backward has left the gradient of the mean `loss` over `samples`.

        Returns:
            Whether to push now.
        """
        return True

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Fill the push message; sets the row's `weight` and `bad`, and a bad row's samples and loss to 0.

        A single worker's weight is 1 and not its samples: (n g) / n would differ from g in the last bit.
        """
        flat, push = self.replica.flat, self.replica.push
        present = flat.collect()
        if self.members is not None:  # of several optimizers one steps
            present = [seen and number in self.members for number, seen in enumerate(present)]
        if not self.replica.wire_is_grad and not self.replica.handed:
            push.gradients.copy_(flat.grad)
        self.replica.handed = False
        metrics = self._look(row, metrics)
        row.weight = row.steps = self.weigh(row.samples)
        push.clear_behind()
        self.replica.buffers.write(push.floats, push.limbs, row.weight, self.first)
        if row.weight:
            push.write_presence(present)
            if row.weight != 1 and not push.raw:
                push.gradients.mul_(row.weight)
        elif not push.shared:
            push.body.zero_()
        push.write(self.rank, row, metrics)

    def weigh(self, samples: float) -> float:
        """The contribution's weight; may scale what is in the push message."""
        if self.lead is not None:
            return float(self.lead)
        return float(samples > 0) if self.alone or self.config.reduction == "sum" else samples

    def _look(self, row: WorkerStatus, metrics: Sequence[float]) -> Sequence[float]:
        """Mark the row if what is to be pushed is not finite; its loss and metrics are then as useless.

        Where ranks share memory the sum tells, at no further cost, unless this contribution is to be left out of it, or cut.
        """
        if row.overflow:  # no rank steps
            return metrics
        told = self.replica.push.shared and self.config.rule == "mean"
        if told and self.config.nonfinite != "drop":
            return metrics
        bad = self.replica.flat.first_nonfinite(self.replica.push.gradients)
        if bad is None:
            return metrics
        row.bad, row.samples, row.loss = 1 + bad, 0, 0
        return [0.0] * len(metrics)

    def write_nothing(self, row: WorkerStatus, metrics: int) -> None:
        """Fill the push message of a rank that has no data left; gradients not yet pushed stay where they are.

        Args:
            row: this rank's row.
            metrics: the number of extra metrics.
        """
        push = self.replica.push
        push.forget()
        self.replica.buffers.write(push.floats, push.limbs, 0, self.first)
        push.write(self.rank, row, [0.0] * metrics)

    def received(self) -> None:
        """The server's weights have landed in the model."""

    def park(self) -> None:
        """The loop is over: leave the server's weights in the model."""

    def unpark(self) -> None:
        """A loop begins."""

    def state_dict(self) -> dict[str, Any]:
        """What only this worker knows, for a checkpoint: nested dicts of tensors, numbers and texts."""
        return {}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class LocalSteps(Gradient):
    """Steps of the worker's own: how far they led, or the weights themselves where the server only averages.

    The server's weights are kept beside the model's as the anchor; where ranks share them, there. After `write` the model is
    back at them, so that a server on this rank, if the model's memory is its own, too, steps from there, and a round that is
    not taken changes nothing.
    """

    inner: FlatOptimizer
    apart = True

    def __init__(self, *seat: Any, **named: Any) -> None:
        super().__init__(*seat, **named)
        self.steps = 1  # between two rounds; set with the mode
        self.takes_weights = False
        self._anchor: Tensor | None = None
        self._taken = 0  # local steps since the last round
        self._bad: int | None = None

    @property
    def anchor(self) -> Tensor:
        """The server's weights, `(numel,)`, in the model's dtype or the wire's."""
        if self.replica.apart:
            return self.replica.pull.weights
        if self._anchor is None:
            self._anchor = self.replica.push.gradients.new_zeros(self.replica.flat.numel)
        return self._anchor

    @property
    def pending(self) -> bool:  # type: ignore[override]
        """Whether local steps have not been pushed."""
        return self._taken > 0 or self._bad is not None

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """One step of the worker's optimizer; see `Gradient.step`."""
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
        flat.clear()
        return self._bad is not None or self.due(control)

    def due(self, control: Control) -> bool:
        """Whether a round is, after the step just taken."""
        return self._taken >= (1 if control.round < self.config.local.after else self.steps)

    def correct(self) -> None:
        """Change the gradient in the push message before a local step."""

    def weigh(self, samples: float) -> float:
        """See `Gradient`; with `local.weights` uniform, whoever has samples counts as much as any."""
        weight = super().weigh(samples)
        return float(weight > 0) if self.config.local.weights == "uniform" else weight

    def compose(self, samples: float) -> tuple[float, float]:
        """Leave the contribution times its weight in the push message's body.

        All of the gradients' part is written; the rest of the message is zero before.

        Returns:
            The weight, and the local steps.
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
        """See `Gradient.write`."""
        self.replica.push.clear_behind()
        row.weight, steps = self.compose(row.samples)
        row.steps = row.weight * steps
        if not self.replica.apart:
            self.go_back()
        self.seal(row, metrics)

    def go_back(self) -> None:
        """The model is at the server's weights again."""
        self.replica.flat.weights.copy_(self.anchor)
        self.inner.refresh()

    def seal(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Judge the composed body and write the tail."""
        push, self._bad, bad = self.replica.push, None, self._bad
        metrics = self._look(row, metrics)
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
        """See `Gradient`."""
        if self.replica.apart:
            self.replica.flat.weights.copy_(self.anchor)
        else:
            self.anchor.copy_(self.replica.flat.weights)
        self.inner.refresh()

    def state_dict(self) -> dict[str, Any]:
        """The worker's optimizer; its weights are the server's when a round is over."""
        return {"inner": self.inner.state_dict() | {"masters": {}}}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """See `Gradient`."""
        if "inner" in tree:
            self.inner.load_state_dict(tree["inner"])
