"""Clients: many of them, each with data of its own, hosted by fewer workers.

A worker trains its clients of the round one after another, each from the server's weights, and pushes their sum once. Where the
rule is not the mean, it judges clients: the worker keeps theirs apart, and each is a row of its own (`reduce/client_rows.py`).
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
    """Whether all groups have the same of each."""
    first, *others = optimizer.param_groups
    return all(group.get(key) == first.get(key) for group in others for key in keys)


def direction(optimizer: Optimizer) -> int:
    """1, or -1 of one that climbs: what is added to a gradient to be minimised is to have this sign."""
    return -1 if optimizer.param_groups[0].get("maximize") else 1


class FedAvg(LocalSteps):
    """Local epochs of each client (McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    Attributes:
        pinned: whether clients have state of their own and so stay with one worker.
        measuring: whether the client's data pass for its loss at the server's weights; there are no steps then.
    """

    pinned = False
    measuring = False
    raw = False  # a push is the sum of several clients', each times its weight

    def __init__(self, *seat: Any, **named: Any) -> None:
        super().__init__(*seat, **named)
        self._apart = self.config.rule != "mean"  # whether clients are judged one by one
        self._sum: Tensor | None = None  # of the clients; of clients kept apart the integer buffers alone
        self._hosted = 0  # clients that have trained here in this round
        self._weight = self._steps = 0.0
        self._size = 0
        self._left_out: int | None = None  # first slot that was not finite of a client that does not count
        state = self.inner.torch.state
        self._fresh = {
            p: {k: _copy(v) for k, v in kept.items()} for p, kept in state.items()
        }  # torch's Adagrad begins with some
        self.check_optimizer()

    def suits(self) -> str:
        """Which optimizers the mode is defined for, if it is not for this one; else nothing."""
        return ""

    def check_optimizer(self) -> None:
        """The mode is defined for the clients' optimizer as it is now.

        Raises:
            ConfigError: it is not.
        """
        if allowed := self.suits():
            raise ConfigError(f"optimizer: given another with mode {self.config.mode}, allowed: {allowed}")

    @property
    def measures(self) -> bool:
        """Whether each client's data pass once before it trains."""
        return False

    @property
    def pending(self) -> bool:  # type: ignore[override]
        """Whether clients have trained that have not been pushed."""
        return self._hosted > 0 or self._left_out is not None or super().pending

    def check(self, chosen: int) -> None:
        """So many clients a round are enough for the rule.

        Raises:
            ConfigError: they are not.
        """
        try:
            choose(self.config)[0].check(chosen)
        except RuleError as error:
            raise ConfigError(f"rule: {error}, the clients of a round") from None

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """`client`, with `size` items, one of `chosen` in this round out of `clients`, begins."""
        self.check_optimizer()  # the script may have set something since
        self.client, self._size, self.chosen, self.clients = client, size, chosen, clients
        self.alone, self.measuring = chosen == 1, False
        self._forget()

    def _forget(self) -> None:
        """A client keeps nothing of what was before it: optimizer state, gradients, buffers."""
        state = self.inner.torch.state
        state.clear()
        state.update({p: {k: _copy(v) for k, v in kept.items()} for p, kept in self._fresh.items()})
        self.replica.flat.clear()
        self.replica.buffers.load(self.replica.pull.buffers)

    def measure(self, loss: float, samples: float) -> None:
        """Take note of the mean `loss` over `samples` of the client's data at the server's weights."""

    def trains(self) -> None:
        """The client's data have passed for its loss; it trains from now on."""
        self.measuring = False
        self._forget()

    def step(self, loss: float, samples: float, control: Control) -> bool:
        """See `LocalSteps`; no push is due before all clients of this worker have trained."""
        super().step(loss, samples, control)
        return False

    def end(self) -> None:
        """The client has trained: put it to the others of this worker."""
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
        """Floats are summed, or kept apart; integers are those of the first client."""
        push = self.replica.push
        client = push.message[: push.tail_at + push.limbs.numel()]
        if self._apart:
            push.clients.append(Contribution(self.client, push.body.clone(), self._size, weight))
            client = push.limbs
        if self._sum is None:
            self._sum = client.clone()
        elif self._hosted == 1:
            self._sum.copy_(client)
        elif not self._apart:
            self._sum[: push.tail_at].add_(client[: push.tail_at])

    def _leave_out(self, bad: int) -> None:
        """A client that is not finite: it counts for nothing, or this worker says so and the round does not count."""
        self._taken = 0
        self.go_back()
        self._forget()
        if self._apart:
            push = self.replica.push
            push.clients.append(Contribution(self.client, torch.zeros_like(push.body), bad=1 + bad))
        if self.config.nonfinite == "drop":
            self._left_out, self._bad = bad, None
        else:
            self._bad = bad

    def write(self, row: WorkerStatus, metrics: Sequence[float]) -> None:
        """See `Gradient.write`."""
        if self._taken:
            self.end()  # of a client whose loop the script broke out of
        push, left_out = self.replica.push, self._left_out
        push.forget()
        if self._sum is not None and self._hosted:
            (push.limbs if self._apart else push.message[: len(self._sum)]).copy_(self._sum)
        else:
            self.replica.buffers.write(push.floats, push.limbs, 0, self.first)
        row.weight, row.steps, self._weight, self._steps = self._weight, self._steps, 0.0, 0.0
        self._hosted, self._left_out = 0, None
        self.seal(row, metrics)
        if left_out is not None and not row.bad:  # the others count; what is known of the loss counts for nothing
            row.bad, row.samples, row.loss = 1 + left_out, 0, 0
            push.write(self.rank, row, [0.0] * len(metrics))

    def state_dict(self) -> dict[str, Any]:
        """The worker's scheduler: clients begin anew in each round."""
        self._forget()
        return {"inner": self.inner.state_dict() | {"masters": {}}}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class FedProx(FedAvg):
    """Local loss plus mu/2 |w - w_t|^2 (Li et al. 2020, arXiv 1812.06127, equation 2); minus that, of what is maximized."""

    def suits(self) -> str:
        """See `FedAvg`."""
        same = alike(self.inner.torch, "maximize")
        return "" if same else "one whose groups all have maximize, or none has"

    def correct(self) -> None:
        """grad += mu (w - w_t)."""
        mu = (0.01 if self.config.clients.mu is None else self.config.clients.mu) * direction(self.inner.torch)
        if mu:
            self.replica.push.gradients.add_(self.inner.whole, alpha=mu).sub_(self.anchor, alpha=mu)


class FedNova(FedAvg):
    """Each client's change divided by |a|_1, the sum of what its gradients count in it (Wang et al. 2020, arXiv 2007.07481).

    Of plain SGD that is the number of local steps tau, with momentum m the sum of (1 - m^k) / (1 - m) over k = 1, ..., tau
    (section 4.2); Nesterov's and a learning rate that changes on the way are counted as they are. Weight decay is a part of
    the client's objective: its gradients count as the others do. The server multiplies the mean by the mean of |a|_1.
    """

    def suits(self) -> str:
        """See `FedAvg`."""
        ok = isinstance(self.inner.torch, SGD) and alike(self.inner.torch, "momentum", "dampening", "nesterov")
        return "" if ok else "torch.optim.SGD, with one momentum for all parameters"

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """See `FedAvg`."""
        super().begin(client, size, chosen, clients)
        self._buffer = self._norm = 0.0

    def correct(self) -> None:
        """Count the step to come: by how much the weights would move in all if every gradient were 1, in units of one rate."""
        group, unit = self.inner.torch.param_groups[0], float(self.inner.torch.defaults["lr"]) or 1.0
        m, fresh = group["momentum"], 1.0 if self._taken == 0 else 1.0 - group["dampening"]
        self._buffer = m * self._buffer + fresh
        count = 1.0 + m * self._buffer if group["nesterov"] or not m else self._buffer
        self._norm += count * (self.inner.lr / unit)

    def compose(self, samples: float) -> tuple[float, float]:
        """See `LocalSteps`; |a|_1 in place of the local steps."""
        weight, _ = super().compose(samples)
        return weight, self._norm

    def weigh(self, samples: float) -> float:
        """See `LocalSteps`."""
        self.replica.push.gradients.div_(self._norm or 1.0)  # 0 of a learning rate of 0
        return super().weigh(samples)


class QFedAvg(FedAvg):
    """Clients with a larger loss count more (Li et al. 2020, arXiv 1905.10497, algorithm 2), L = 1 / learning rate.

    Pushes F^q L (w - w_k) with weight h = q F^(q-1) |L (w - w_k)|^2 + L F^q; their sums' quotient is the server's step.
    L (w - w_k) stands for the gradient of F, which takes plain SGD. With q = 0 L cancels out.
    """

    @property
    def measures(self) -> bool:
        """See `FedAvg`."""
        return self.config.clients.q > 0

    def suits(self) -> str:
        """See `FedAvg`."""
        own, unlike = self.inner.torch, ("momentum", "weight_decay", "maximize")
        plain = isinstance(own, SGD) and alike(own, "lr") and not any(g[key] for g in own.param_groups for key in unlike)
        allowed = "torch.optim.SGD without momentum, weight decay and maximize, with one learning rate; or clients.q=0"
        return "" if plain or self.config.clients.q == 0 else allowed

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """See `FedAvg`."""
        super().begin(client, size, chosen, clients)
        self._loss = self._seen = 0.0

    def measure(self, loss: float, samples: float) -> None:
        """See `FedAvg`."""
        self._loss += loss * samples
        self._seen += samples
        self.replica.flat.clear()

    def weigh(self, samples: float) -> float:
        """See the class."""
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

    The second vector is c on its way back, and the change of c on its way there. Gradients, in c_i and c as well, are those of
    what is minimised: with `weight_decay` of f_i + decay/2 |y|^2, with `maximize` of -f_i.
    """

    pinned = True

    def __init__(self, *seat: Any, **named: Any) -> None:
        super().__init__(*seat, **named)
        self._way = 0.0  # the sum of the learning rates of the client's steps, K lr
        self.variates: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}  # by which those of this round's clients move, if the server takes it
        self._composed = Control()  # what the server had said when they did

    def suits(self) -> str:
        """See `FedAvg`."""
        own = self.inner.torch
        plain = isinstance(own, SGD) and alike(own, "lr", "maximize") and not any(g["momentum"] for g in own.param_groups)
        return "" if plain else "torch.optim.SGD without momentum, with one learning rate"

    def begin(self, client: int, size: int, chosen: int, clients: int) -> None:
        """See `FedAvg`."""
        super().begin(client, size, chosen, clients)
        self._way = 0.0

    @property
    def _own(self) -> Tensor:
        if self.client not in self.variates:
            self.variates[self.client] = torch.zeros_like(self.replica.push.gradients)
        return self.variates[self.client]

    def correct(self) -> None:
        """grad += c - c_i."""
        assert self.replica.pull.second is not None
        sign = direction(self.inner.torch)
        self.replica.push.gradients.sub_(self._own, alpha=sign).add_(self.replica.pull.second, alpha=sign)
        self._way += self.inner.lr

    def compose(self, samples: float) -> tuple[float, float]:
        """See `LocalSteps`; c_i+ = c_i - c + (x - y) / (K lr)."""
        push, pull = self.replica.push, self.replica.pull
        assert push.second is not None
        assert pull.second is not None
        change = push.second.copy_(self.anchor).sub_(self.inner.whole).div_(self._way or 1.0).sub_(pull.second)
        self._moved[self.client], self._composed = change.clone(), pull.control
        change.mul_(self.chosen / self.clients)  # c moves by the mean over all clients, the server takes it over the chosen
        return super().compose(samples)

    def weigh(self, samples: float) -> float:
        """Every client counts alike."""
        return 1.0

    def received(self) -> None:
        """See `Gradient`."""
        super().received()
        self._settle()

    def _settle(self) -> None:
        """If the round is over, the c_i of its clients move, unless the server has not taken it."""
        said = self.replica.pull.control
        if not self._moved or said.round == self._composed.round:
            return
        if said.version > self._composed.version:
            for client, change in self._moved.items():
                self.variates[client].add_(change)
        self._moved.clear()

    def state_dict(self) -> dict[str, Any]:
        """The hosted clients' control variates by client and parameter, beside what `FedAvg` has."""
        self._settle()  # a checkpoint that the control asks for is written before `received`
        flat = self.replica.flat
        return super().state_dict() | {"clients": {str(k): dict(flat.named(c)) for k, c in self.variates.items()}}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """See `Gradient`."""
        super().load_state_dict(tree)
        self.variates = {}
        for key, named in tree.get("clients", {}).items():
            variate = self.variates[int(key)] = torch.zeros_like(self.replica.push.gradients)
            for name, view in self.replica.flat.named(variate):
                view.copy_(named[name])
