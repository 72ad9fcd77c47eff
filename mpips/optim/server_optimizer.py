"""Server optimizers that torch lacks, for the server's step on the result of local training.

`p.grad` holds the pseudo-gradient D = x - mean(x_i): the weights x that the server sent, minus the mean of the weights x_i that
came back. The FedOpt papers use the opposite sign, mean(x_i) - x, and add where these classes subtract; the bits are the same.

FedAvgM (Hsu et al. 2019, arXiv 1909.06335: v <- beta v + D, w <- w - v) is `torch.optim.SGD(lr=1, momentum=beta)`, and FedAvg
is `torch.optim.SGD(lr=1)`, so they have no class here.

All classes work coordinate by coordinate: a step on a slice gives the same bits as a step on the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _Coordinatewise(Optimizer):
    """The base class: a step updates each parameter that has a gradient on its own."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient.

        Args:
            closure: evaluates the loss again, as in `torch.optim`.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter in place."""
        raise NotImplementedError


class SetWeights(_Coordinatewise):
    """w <- D: the contents of `p.grad`, such as the mean of the workers' weights, become the new weights.

    Args:
        params: parameters or groups of them, of any dtype.
    """

    def __init__(self, params: ParamsT) -> None:
        super().__init__(params, {"lr": 1.0})

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.copy_(grad)


class _FedOpt(_Coordinatewise):
    """The base class of FedAdagrad, FedYogi and FedAdam, which differ in how the second moment accumulates."""

    def __init__(self, params: ParamsT, lr: float, momentum: float, beta2: float, tau: float) -> None:
        _allow("lr", lr, "0 or more", 0 <= lr < math.inf)
        _allow("momentum", momentum, "from 0 to less than 1", 0 <= momentum < 1)
        _allow("beta2", beta2, "from 0 to less than 1", 0 <= beta2 < 1)
        _allow("tau", tau, "above 0", 0 < tau < math.inf)
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta2": beta2, "tau": tau})

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum, tau = self.state[p], group["momentum"], group["tau"]
        if not state:  # the first gradient of this parameter
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.full_like(p, tau**2, memory_format=torch.preserve_format)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(momentum).add_(grad, alpha=1 - momentum)
        self._accumulate(square, grad, group["beta2"])
        p.addcdiv_(mean, square.sqrt().add_(tau), value=-float(group["lr"]))  # no bias correction, unlike torch's

    def _accumulate(self, square: Tensor, grad: Tensor, beta2: float) -> None:
        """Update the second moment `square` in place."""
        raise NotImplementedError


class FedAdagrad(_FedOpt):
    """Adagrad on the server (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v <- v + D^2.

    m <- beta_1 m + (1 - beta_1) D; w <- w - lr m / (sqrt(v) + tau). v starts at tau^2, m at 0. The state of a parameter is
    `exp_avg` (m) and `exp_avg_sq` (v), of the parameter's shape and dtype.

    Args:
        params: parameters or groups of them, float32 or float64.
        lr: the paper's eta.
        momentum: beta_1; the paper uses none with Adagrad.
        tau: degree of adaptivity; smaller is more adaptive.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(params, lr, momentum, 0.0, tau)

    def _accumulate(self, square: Tensor, grad: Tensor, beta2: float) -> None:
        square.addcmul_(grad, grad)


class FedYogi(_FedOpt):
    """Yogi on the server (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v <- v - (1 - beta_2) D^2 sign(v - D^2).

    Unlike Adam's, v shrinks by at most (1 - beta_2) D^2 in a step. Everything else is as in `FedAdam`.

    Args:
        params, lr, momentum, beta2, tau: as in `FedAdam`.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        super().__init__(params, lr, momentum, beta2, tau)

    def _accumulate(self, square: Tensor, grad: Tensor, beta2: float) -> None:
        new = grad * grad
        square.addcmul_(new, (square - new).sign_(), value=beta2 - 1)


class FedAdam(_FedOpt):
    """Adam on the server (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): v <- beta_2 v + (1 - beta_2) D^2.

    m <- beta_1 m + (1 - beta_1) D; w <- w - lr m / (sqrt(v) + tau). v starts at tau^2, m at 0. Unlike `torch.optim.Adam` there
    is no bias correction of m and v. The state of a parameter is `exp_avg` (m) and `exp_avg_sq` (v), of the parameter's shape
    and dtype.

    Args:
        params: parameters or groups of them, float32 or float64.
        lr: the paper's eta.
        momentum: beta_1.
        beta2: decay of the second moment.
        tau: degree of adaptivity; smaller is more adaptive.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        super().__init__(params, lr, momentum, beta2, tau)

    def _accumulate(self, square: Tensor, grad: Tensor, beta2: float) -> None:
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


class SlowMo(_Coordinatewise):
    """Slow momentum (Wang et al. 2020, arXiv 1910.00643, algorithm 1): u <- beta u + D / gamma; w <- w - alpha gamma u.

    gamma is the workers' learning rate in the round that has just ended: set the group's `inner_lr` before the step whenever it
    changes. While gamma is 0 no worker has moved, and a step changes nothing. With a constant gamma this is
    `torch.optim.SGD(lr=alpha, momentum=beta)` up to rounding. The state of a parameter is `momentum_buffer` (u), of the
    parameter's shape and dtype.

    Args:
        params: parameters or groups of them, float32 or float64.
        lr: alpha, the slow learning rate.
        momentum: beta, the slow momentum.
        inner_lr: gamma.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, momentum: float = 0.5, inner_lr: float = 1.0) -> None:
        _allow("lr", lr, "0 or more", 0 <= lr < math.inf)
        _allow("momentum", momentum, "from 0 to less than 1", 0 <= momentum < 1)
        _allow("inner_lr", inner_lr, "0 or more", 0 <= inner_lr < math.inf)
        super().__init__(params, {"lr": lr, "momentum": momentum, "inner_lr": inner_lr})

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        gamma = float(group["inner_lr"])
        if gamma == 0:
            return
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        slow = state["momentum_buffer"]
        slow.mul_(group["momentum"]).add_(grad, alpha=1 / gamma)
        p.add_(slow, alpha=-float(group["lr"]) * gamma)


def _allow(name: str, given: float, allowed: str, ok: bool) -> None:
    """Raise ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: given {given}, allowed: a number {allowed}")
