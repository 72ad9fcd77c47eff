"""The federated modes: many clients, each with data of its own, hosted by fewer workers.

A worker trains its clients of the round one after another, each from the server's weights, and pushes the sum of their
contributions once. A rule other than the mean combines clients instead of workers: the worker then keeps the clients'
contributions apart, and each is a row of its own (`reduce/client_rows.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mpips.algorithms.update import LocalSteps
from mpips.config import ConfigError
from mpips.model.message import Contribution, Control, WorkerStatus
from mpips.rules import RuleError, choose


def alike(optimizer: Optimizer, *keys: str) -> bool:
    """Return whether all parameter groups agree in each of these hyperparameters."""
    first, *others = optimizer.param_groups
    return all(group.get(key) == first.get(key) for group in others for key in keys)


def direction(optimizer: Optimizer) -> int:
    """Return 1, or -1 if the optimizer maximizes: the sign of a gradient term that is to be minimised."""
    return -1 if optimizer.param_groups[0].get("maximize") else 1


class FedAvg(LocalSteps):
    """Local epochs of each client (McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    Attributes:
        pinned: whether clients have state of their own and therefore stay on one worker.
        measuring: whether the client's data are passing only to measure the loss at the server's weights, without steps.
    """

    pinned = False
    measuring = False
    raw = False  # a push is a sum over clients, already weighted

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._by_client = self.config.rule != "mean"  # whether each client's contribution is a row of its own
        self._sum: Tensor | None = None  # of the clients' contributions; with rows by client, the integer buffers only
        self._hosted = 0  # clients that this worker has trained in this round
        self._weight = self._steps = 0.0
        self._size = 0
        self._left_out: int | None = None  # the first non-finite tensor of a client that was dropped
        state = self.inner.torch.state
        self._fresh = {
            p: {k: _copy(v) for k, v in entries.items()} for p, entries in state.items()
        }  # the state of a new client: Adagrad's is not empty
        self.check_optimizer()

    def suits(self) -> str:
        """Return which optimizers the mode allows, if the clients' optimizer is none of them; else an empty text."""
        return ""

    def check_optimizer(self) -> None:
        """Check that the mode is defined for the clients' optimizer with its present hyperparameters.

        Raises:
            ConfigError: it is not.
        """
        if allowed := self.suits():
            raise ConfigError(f"optimizer: given another with mode {self.config.mode}, allowed: {allowed}")

    @property
    def measures(self) -> bool:
        """Whether each client's data pass once before training, to measure the loss."""
        return False

    @property
    def pending(self) -> bool:  # type: ignore[override]
        """Whether clients have trained, or failed, whose contribution has not been pushed."""
        return self._hosted > 0 or self._left_out is not None or super().pending

    def check(self, chosen: int) -> None:
        """Check that `chosen` clients a round are enough for the rule.

        Raises:
            ConfigError: they are not.
        """
        try:
            choose(self.config)[0].check(chosen)
        except RuleError as error:
            raise ConfigError(f"rule: {error}, the clients of a round") from None

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """Begin a client's training.

        Args:
            client: its number.
            size: its number of items.
            chosen: the number of clients in this round.
            clients: the number of all clients.
        """
        self.check_optimizer()  # the script may have changed hyperparameters
        self.client, self._size, self.chosen, self.clients = client, size, chosen, clients
        self.alone, self.measuring = chosen == 1, False
        self._forget()

    def _forget(self) -> None:
        """Reset optimizer state, gradients and buffers, so that a client inherits nothing from the one before."""
        state = self.inner.torch.state
        state.clear()
        state.update({p: {k: _copy(v) for k, v in entries.items()} for p, entries in self._fresh.items()})
        self.replica.flat.clear()
        self.replica.buffers.load(self.replica.pull.buffers)

    def measure(self, loss: float, samples: float) -> None:
        """Take note of the mean `loss` over `samples` of the client's data at the server's weights."""

    def trains(self) -> None:
        """End the measurement of the loss; the client's steps follow."""
        self.measuring = False
        self._forget()

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """Take one local step of the client. Returns False: a push is due when all clients of this worker have trained."""
        super().step(loss, samples, control)
        return False

    def end(self) -> None:
        """End a client's training: add its contribution to those of this worker's other clients."""
        bad = self.replica.flat.first_nonfinite(self.inner.whole) if self._bad is None else self._bad
        if bad is not None:
            self._leave_out(bad)
        elif self._taken:  # else it had no data
            self.replica.push.clear_behind()
            weight, steps = self.compose(self._size)
            self.go_back()
            self._weight += weight
            self._steps += weight * steps
            self._hosted += 1
            self._add(weight)
        self.replica.flat.clear()

    def _add(self, weight: float) -> None:
        """Add the composed contribution to the sum, or keep it as a row. Integer buffers are those of the first client."""
        push = self.replica.push
        client = push.message[: push.tail_at + push.limbs.numel()]
        if self._by_client:
            push.clients.append(Contribution(self.client, push.body.clone(), self._size, weight))
            client = push.limbs
        if self._sum is None:
            self._sum = client.clone()
        elif self._hosted == 1:
            self._sum.copy_(client)
        elif not self._by_client:
            self._sum[: push.tail_at].add_(client[: push.tail_at])

    def _leave_out(self, bad: int) -> None:
        """Leave out a client whose weights are not finite. Unless `nonfinite=drop`, this worker's row then reports it."""
        self._taken = 0
        self.go_back()
        self._forget()
        if self._by_client:
            push = self.replica.push
            push.clients.append(Contribution(self.client, torch.zeros_like(push.body), bad=1 + bad))
        if self.config.nonfinite == "drop":
            self._left_out, self._bad = bad, None
        else:
            self._bad = bad

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """Fill the push message with the clients' sum, or with zeros besides rows by client; see `Gradient.write`."""
        if self._taken:
            self.end()  # the script broke out of this client's loop
        push, left_out = self.replica.push, self._left_out
        push.forget()
        if self._sum is not None and self._hosted:
            (push.limbs if self._by_client else push.message[: len(self._sum)]).copy_(self._sum)
        else:
            self.replica.buffers.write(push.floats, push.limbs, 0, self.first)
        row.weight, row.steps, self._weight, self._steps = self._weight, self._steps, 0.0, 0.0
        self._hosted, self._left_out = 0, None
        self.seal(row, metrics)
        if left_out is not None and not row.bad:  # the other clients count, but the loss includes the dropped one
            row.bad, row.samples, row.loss = 1 + left_out, 0, 0
            push.write(self.rank, row, [0.0] * len(metrics))

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state without any client's: clients begin anew in each round."""
        self._forget()
        return {"inner": self.inner.state_dict() | {"masters": {}}}


def _copy(value: Any) -> Any:
    """Return a copy of a tensor, and any other value as it is."""
    return value.clone() if isinstance(value, Tensor) else value


class FedProx(FedAvg):
    """Local loss plus mu/2 |w - w_t|^2 (Li et al. 2020, arXiv 1812.06127, equation 2), or minus it with `maximize`."""

    def suits(self) -> str:
        """Return which optimizers the mode allows; see `FedAvg.suits`."""
        same = alike(self.inner.torch, "maximize")
        return "" if same else "one whose groups all have maximize, or none has"

    def correct(self) -> None:
        """Add mu (w - w_t) to the gradient."""
        mu = (0.01 if self.config.clients.mu is None else self.config.clients.mu) * direction(self.inner.torch)
        if mu:
            self.replica.push.gradients.add_(self.inner.whole, alpha=mu).sub_(self.anchor, alpha=mu)


class FedNova(FedAvg):
    """Each client's change divided by |a|_1, the total weight of its gradients (Wang et al. 2020, arXiv 2007.07481).

    For plain SGD |a|_1 is the number of local steps tau; with momentum m it is the sum of (1 - m^k) / (1 - m) over k = 1, ...,
    tau (section 4.2). Nesterov momentum and a learning rate that changes within the round are accounted for. Weight decay is
    part of the client's objective, so its gradients count as well. The server multiplies the mean by the mean of |a|_1.
    """

    def suits(self) -> str:
        """Return which optimizers the mode allows; see `FedAvg.suits`."""
        ok = isinstance(self.inner.torch, SGD) and alike(self.inner.torch, "momentum", "dampening", "nesterov")
        return "" if ok else "torch.optim.SGD, with one momentum for all parameters"

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """Begin a client with |a|_1 = 0; see `FedAvg`."""
        super().begin(client, size, chosen, clients)
        self._buffer = self._norm = 0.0

    def correct(self) -> None:
        """Add the coming step's part to |a|_1: how far all steps would move a weight if every gradient were 1, over the first
        rate.
        """
        group, unit = self.inner.torch.param_groups[0], float(self.inner.torch.defaults["lr"]) or 1.0
        m, fresh = group["momentum"], 1.0 if self._taken == 0 else 1.0 - group["dampening"]
        self._buffer = m * self._buffer + fresh
        count = 1.0 + m * self._buffer if group["nesterov"] or not m else self._buffer
        self._norm += count * (self.inner.lr / unit)

    def compose(self, samples: float) -> tuple[float, float]:
        """Write the contribution; return its weight, and |a|_1 in place of the number of local steps. See `LocalSteps`."""
        weight, _ = super().compose(samples)
        return weight, self._norm

    def weigh(self, samples: float) -> float:
        """Divide the change by |a|_1 and return the weight; see `LocalSteps`."""
        self.replica.push.gradients.div_(self._norm or 1.0)  # the norm is 0 with a learning rate of 0
        return super().weigh(samples)


class QFedAvg(FedAvg):
    """q-FedAvg: clients with a larger loss count more (Li et al. 2020, arXiv 1905.10497, algorithm 2), L = 1 / learning rate.

    A client contributes F^q L (w - w_k) with weight h = q F^(q-1) |L (w - w_k)|^2 + L F^q; the quotient of their sums is the
    server's step. L (w - w_k) stands for the gradient of F, which is true of plain SGD only. With q = 0, L cancels out.
    """

    @property
    def measures(self) -> bool:
        """Whether q > 0, so that the loss is needed; see `FedAvg`."""
        return self.config.clients.q > 0

    def suits(self) -> str:
        """Return which optimizers the mode allows; see `FedAvg.suits`."""
        own, unlike = self.inner.torch, ("momentum", "weight_decay", "maximize")
        plain = isinstance(own, SGD) and alike(own, "lr") and not any(g[key] for g in own.param_groups for key in unlike)
        allowed = "torch.optim.SGD without momentum, weight decay and maximize, with one learning rate; or clients.q=0"
        return "" if plain or self.config.clients.q == 0 else allowed

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """Begin a client with no loss measured; see `FedAvg`."""
        super().begin(client, size, chosen, clients)
        self._loss = self._seen = 0.0

    def measure(self, loss: float, samples: float) -> None:
        """Add to the client's loss F; see `FedAvg`."""
        self._loss += loss * samples
        self._seen += samples
        self.replica.flat.clear()

    def weigh(self, samples: float) -> float:
        """Scale the change and return h, such that the scaled change times h is F^q L (w - w_k); see the class."""
        q, rate = self.config.clients.q, self.inner.lr
        if q == 0:  # every client counts alike
            return 1.0
        loss = max(self._loss / max(self._seen, 1.0), 1e-10)
        change = self.replica.push.gradients.div_(rate)
        weight: float = q * loss ** (q - 1) * float(change.double().square().sum()) + loss**q / rate
        change.mul_(loss**q / weight)  # to be multiplied by the weight
        return weight


class Scaffold(FedAvg):
    """Control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II).

    The message's second vector is c on the way to the workers, and the change of c on the way to the server. Gradients, also
    those in c_i and c, are those of the minimised function: f_i + decay/2 |y|^2 with `weight_decay`, -f_i with `maximize`.
    """

    pinned = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lr_sum = 0.0  # over the client's steps, K lr
        self.variates: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}  # changes of c_i, applied if the server takes the update
        self._composed = Control()  # the server's control when `_moved` was computed

    def suits(self) -> str:
        """Return which optimizers the mode allows; see `FedAvg.suits`."""
        own = self.inner.torch
        plain = isinstance(own, SGD) and alike(own, "lr", "maximize") and not any(g["momentum"] for g in own.param_groups)
        return "" if plain else "torch.optim.SGD without momentum, with one learning rate"

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """Begin a client with K lr = 0; see `FedAvg`."""
        super().begin(client, size, chosen, clients)
        self._lr_sum = 0.0

    @property
    def _own(self) -> Tensor:
        """The control variate c_i of the present client; zeros at first."""
        if self.client not in self.variates:
            self.variates[self.client] = torch.zeros_like(self.replica.push.gradients)
        return self.variates[self.client]

    def correct(self) -> None:
        """Add c - c_i to the gradient."""
        assert self.replica.pull.second is not None
        sign = direction(self.inner.torch)
        self.replica.push.gradients.sub_(self._own, alpha=sign).add_(self.replica.pull.second, alpha=sign)
        self._lr_sum += self.inner.lr

    def compose(self, samples: float) -> tuple[float, float]:
        """Write the contribution, and the change of c: c_i+ = c_i - c + (x - y) / (K lr). See `LocalSteps`."""
        push, pull = self.replica.push, self.replica.pull
        assert push.second is not None
        assert pull.second is not None
        change = push.second.copy_(self.anchor).sub_(self.inner.whole).div_(self._lr_sum or 1.0).sub_(pull.second)
        self._moved[self.client], self._composed = change.clone(), pull.control
        change.mul_(self.chosen / self.clients)  # the paper averages over all clients, the server over the chosen
        return super().compose(samples)

    def weigh(self, samples: float) -> float:
        """Return 1: every client has the same weight."""
        return 1.0

    def received(self) -> None:
        """Update weights and control variates; see `Gradient`."""
        super().received()
        self._finish_round()

    def _finish_round(self) -> None:
        """After the round, apply the changes of its clients' c_i, unless the server did not take the update."""
        control = self.replica.pull.control
        if not self._moved or control.round == self._composed.round:
            return
        if control.version > self._composed.version:
            for client, change in self._moved.items():
                self.variates[client].add_(change)
        self._moved.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the hosted clients' control variates, by client and parameter, besides the state of `FedAvg`."""
        self._finish_round()  # a checkpoint that the control asks for is written before `received`
        flat = self.replica.flat
        return super().state_dict() | {"clients": {str(k): dict(flat.named(c)) for k, c in self.variates.items()}}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore the control variates; see `Gradient`."""
        super().load_state_dict(tree)
        self.variates = {}
        for key, named in tree.get("clients", {}).items():
            variate = self.variates[int(key)] = torch.zeros_like(self.replica.push.gradients)
            for name, view in self.replica.flat.named(variate):
                view.copy_(named[name])
