"""Elastic averaging (Zhang et al. 2015, arXiv 1412.6651): an elastic force ties each worker's weights to the server's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD

from mpips.algorithms.update import LocalSteps
from mpips.config import ConfigError
from mpips.model.message import Control, Pull, WorkerStatus


class EASGD(LocalSteps):
    """EASGD, algorithm 1: every tau steps d = alpha (x - centre), x <- x - d, centre <- centre + d.

    As in the paper, the gradient is taken at x, and d is computed before the local step. The server's weights arrive in
    `centre` instead of the model. Workers push -d, and the server steps with learning rate 1.

    Attributes:
        centre: the pull message in which the server's weights arrive.
    """

    wants_weights = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replica = self.replica
        self.centre = Pull(
            replica.flat, replica.buffers, lambda n, dtype, device: replica.pull.message.new_zeros(n, dtype=dtype)
        )
        rate = self.config.local.moving_rate
        self.rate = 0.9 / self.workers if rate is None else rate
        self._own: Tensor | None = None  # the worker's weights, while the model holds the centre's
        self._buffers: dict[str, Tensor] = {}  # the worker's buffers, likewise

    @property
    def pending(self) -> bool:  # type: ignore[override]
        """False: steps since the last push stay with the worker."""
        return False

    def place(self, out: Tensor) -> Tensor:
        """Write x, `(numel,)`, to `out` and return it."""
        return out.copy_(self.inner.whole)

    def about_to_push(self) -> bool:
        """Return whether the coming step is the last one before a push."""
        return self._taken + 1 >= self.steps

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """Take a local step. The last step before a push also moves x by -d."""
        if not self.about_to_push():
            super().step(loss, samples, control)
            return self._bad is not None
        whole = self.inner.whole
        pull = self.place(self.anchor).sub_(self.centre.weights).mul_(self.rate)
        super().step(loss, samples, control)
        if self._bad is None:  # else the server rejects the push
            whole.sub_(pull)
        if whole is not self.replica.flat.weights:
            self.replica.flat.weights.copy_(whole)
        return True

    def park(self) -> None:
        """Put the centre into the model, and keep the worker's weights and buffers apart.

        If the server is on this rank, the model's memory is the server's.
        """
        flat, buffers = self.replica.flat, self.replica.buffers
        if self._own is None:
            self._own = self.inner.whole.clone()
            self._buffers = {} if self.here else {name: buffer.clone() for name, buffer in buffers.named.items()}
        elif self.here:
            return  # the server may have stepped the model since
        flat.weights.copy_(self.centre.weights)
        if not self.here:
            buffers.load(self.centre.buffers)

    def unpark(self) -> None:
        """Put the worker's own weights and buffers back into the model."""
        if self._own is None:
            return
        if self.here:
            self.centre.weights.copy_(self.replica.flat.weights)
        self.inner.whole.copy_(self._own)
        self.replica.flat.weights.copy_(self._own)
        for name, buffer in self._buffers.items():
            self.replica.buffers.named[name].data.copy_(buffer)
        self._own, self._buffers = None, {}

    def write_nothing(self, row: WorkerStatus, metrics: int) -> None:
        """Fill the push message of a rank without data, then lend the model to the server; see `Gradient`."""
        super().write_nothing(row, metrics)
        self._lend()

    def _lend(self) -> None:
        """Put the centre into the model for the round, if the server is on this rank."""
        if self.here:
            self.park()

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Push -d with weight 1; buffers stay the worker's own. See `Gradient.write`."""
        push = self.replica.push
        push.clear_behind()
        push.gradients.copy_(self.anchor).neg_()
        row.weight, row.steps, self._taken = 1.0, float(self._taken), 0
        self.replica.buffers.write(push.floats, push.limbs, row.weight, self.first)
        self.seal(row, metrics)
        self._lend()

    def received(self) -> None:
        """Begin at the server's weights; with the server on this rank, later calls copy the stepped weights to the centre."""
        if self.here and self._own is not None:
            self.unpark()
            return
        self._own, self._buffers = None, {}
        self.inner.refresh()
        self.centre.weights.copy_(self.replica.flat.weights)
        for buffer, served in zip(self.centre.buffers, self.replica.pull.buffers, strict=True):
            buffer.copy_(served)

    def state_dict(self) -> dict[str, Any]:
        """Return the worker's optimizer, its weights and buffers, and the steps since the last push."""
        own, buffers = self.inner.whole if self._own is None else self._own, self._buffers or dict(self.replica.buffers.named)
        weights = dict(self.replica.flat.named(own))
        return {"inner": self.inner.state_dict(), "weights": weights, "buffers": buffers, "taken": self._taken}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore the worker's state. A worker without saved state begins at the server's weights. See `Gradient`."""
        super().load_state_dict(tree)
        if "weights" in tree:
            for name, view in self.replica.flat.named(self.inner.whole):
                view.copy_(tree["weights"][name])
            self.replica.flat.weights.copy_(self.inner.whole)
            for name, buffer in self.replica.buffers.named.items():
                buffer.copy_(tree["buffers"][name])
            self._taken = int(tree["taken"])
            self.park()  # until the next loop begins


class ElasticMomentum(EASGD):
    """EAMSGD, algorithm 2: v <- delta v - lr g(x + delta v), x <- x + v, and every tau steps the elastic force acts on x.

    With torch's Nesterov SGD the model holds x + delta v, the point of the next gradient, where v is -lr times the momentum
    buffer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = self.inner.torch
        if not isinstance(own, SGD) or not all(g["nesterov"] for g in own.param_groups):
            raise ConfigError(
                "optimizer: given another with mode eamsgd, allowed: torch.optim.SGD(momentum=..., nesterov=True)"
            )

    def place(self, out: Tensor) -> Tensor:
        """Write x, computed from the model's x + delta v and the momentum, to `out`; see `EASGD`."""
        super().place(out)
        views = dict(zip(self.inner.weights, (view for _, view in self.replica.flat.named(out)), strict=True))
        for group in self.inner.torch.param_groups:
            for p in group["params"]:
                momentum = self.inner.torch.state.get(p, {}).get("momentum_buffer")
                if momentum is not None:  # else there has been no step
                    views[p].add_(momentum, alpha=float(group["lr"]) * group["momentum"])
        return out
