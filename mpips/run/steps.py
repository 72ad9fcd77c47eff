"""The steps of the script's optimizers: each is a round, or taken on every worker alike where the optimizer needs that.

`wrapped_optimizer.py` calls these methods, from the methods of the script's own objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpips.config import ConfigError
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.optim.foreign import evaluates, needs_its_own_step, unhooked
from mpips.run.keeping import Keeping
from mpips.run.loop import Loop, Said, as_number
from mpips.run.roles import Roles
from mpips.run.state_elsewhere import give_state_back
from mpips.worker.async_worker import Client

UNSAID: Said = (None, None, {})


@dataclass(frozen=True)
class OwnStep:
    """A step that every worker takes itself, on weights of its own, as the optimizer evaluates the loss in the middle.

    Attributes:
        which: the index of the optimizer.
        pulled: `(numel,)`, the server's weights.
        more: what the worker's status has said before.
        taken: False if a resumed run has taken the step before, so that nothing is to be done.
    """

    which: int
    pulled: Tensor
    more: float
    taken: bool = True


class Steps:
    """What the script's optimizers do in a run, by their numbers among those given to `connect`.

    Args:
        roles: this rank's parts in the run.
        optimizers: the script's optimizers.
        keeping: what the script keeps.
        loop: the script's loops over data.
        tell: prints a line on worker 0.

    Attributes:
        optimizers: see above.
        said: what the script says by `ps.step` of the step in progress.
    """

    def __init__(
        self, roles: Roles, optimizers: Sequence[Optimizer], keeping: Keeping, loop: Loop, tell: Callable[[str], object]
    ) -> None:
        assert roles.worker
        self.optimizers = optimizers
        self._config, self._server, self._worker = roles.config, roles.server, roles.worker
        self._flat, self._alone = roles.worker.replica.flat, roles.communicator.size == 1
        self._keeping, self._loop, self._tell = keeping, loop, tell
        self._several = len(self.optimizers) > 1
        self._evaluates = [self._evaluated(optimizer) for optimizer in self.optimizers]
        self._own_step: OwnStep | None = None  # the step in progress that an optimizer takes on this worker
        self._inside_step = False  # whether its code runs
        self._told_of_gradients = self._told_of_buffers = False
        self.said = UNSAID

    def _evaluated(self, optimizer: Optimizer) -> tuple[bool, bool]:
        """Return whether `evaluate` takes the optimizer's steps: those without a closure, and those with one."""
        own = self._worker.mode.gradients and needs_its_own_step(optimizer)
        return own or evaluates(optimizer, False), own or evaluates(optimizer, True)

    def gradients_zeroed(self) -> None:
        """Count no samples for gradients that the script throws away; with several optimizers, those of others may stay."""
        if not self._several or not self._flat.gradients():
            self._loop.drop_gradients()

    def optimizer_step(self, which: int, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """Take a step: a round, or `evaluate` for an optimizer that needs it. Return the loss, if there is a closure."""
        if self._evaluates[which][closure is not None]:
            return self.evaluate(which, closure, overflow)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if overflow is not None and not self._worker.mode.gradients:
            raise ConfigError(f"GradScaler: given one with mode {self._config.mode}, allowed: mode sync; bfloat16 needs none")
        if self._several or self._keeping.behind:
            self._turn_to(which)
        if self._flat.examined and not (self._loop.rehearsing or self._loop.replay.pending):
            self._look_at_gradients(scaled=overflow is not None)
            self._look_at_buffers()
        if overflow:
            self._worker.status.overflow = True
        self._loop.step(*(self.said if self.said is not UNSAID else (loss, None, {})))
        if overflow:
            self._worker.status.overflow = False
        return loss

    def _turn_to(self, which: int) -> None:
        """Let the following round be about the optimizer `which`."""
        if self._keeping.behind:
            self._keeping.catch_up()
        self._worker.status.which = which
        if self._several:
            number = {p: n for n, p in enumerate(self._flat.parameters)}
            groups = self.optimizers[which].param_groups
            self._worker.update.members = frozenset(number[p] for group in groups for p in group["params"] if p in number)

    def _look_at_gradients(self, scaled: bool) -> None:
        """Say once that the script has changed its own gradients, where it may mean the average of all workers'.

        Args:
            scaled: whether a GradScaler has changed them.
        """
        changed = self._flat.changed_gradient()
        if changed is None or scaled or self._worker.workers == 1 or self._told_of_gradients:
            return
        self._told_of_gradients = True
        name = self._flat.slots[changed].name
        self._tell(
            f"mpips: the script changes the gradient of {name} between backward and the step, or in a hook, on each worker its "
            f"own, before they are averaged. That is right for masks, noise and factors; for clipping, signs and norms call "
            f"ps.average() after backward, and change p.grad then"
        )

    def _look_at_buffers(self) -> None:
        """Say once that a buffer is averaged over the workers that may be no statistics, such as a queue of features."""
        replica = self._worker.replica
        if self._worker.workers == 1 or self._told_of_buffers or not (name := replica.buffers.averaged(replica.pull.buffers)):
            return
        self._told_of_buffers = True
        self._tell(
            f"mpips: the buffer {name}, which each worker changes, is averaged over the workers in each round. That is right "
            f"for running statistics; for a queue or a memory bank choose the setting buffers=local: each worker then has its "
            f"own, and a checkpoint has them all"
        )

    def evaluate(self, which: int, closure: Callable[[], Any] | None, overflow: bool | None = None) -> Any:
        """Take a step of an optimizer that may evaluate the loss several times, or that the script looks into.

        Every worker takes the same step on weights of its own, with averaged losses and gradients. Then the server takes the
        new weights.
        """
        optimizer, flat, status = self.optimizers[which], self._flat, self._worker.status
        if closure is None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("optimizer: given LBFGS, whose step needs a closure, allowed: optimizer.step(closure)")
        losses: list[float] = []

        def averaged_closure() -> Any:
            assert closure
            with torch.enable_grad():
                loss = closure()
            losses.append(self._combine(loss))
            return loss if self._worker.workers == 1 else loss.detach().new_tensor(losses[-1])

        def step() -> Any:
            return None if status.overflow else unhooked(optimizer)(optimizer, *([averaged_closure] if closure else []))

        status.overflow = bool(overflow)
        try:
            if not self._begin_own_step(which):
                self._own_step = None
                return closure() if closure else None
            status.overflow = overflow is not None and flat.first_nonfinite(flat.grad) is not None  # the same on all workers
            return self._end_own_step(step, losses)
        finally:
            status.overflow = False

    def _combine(self, loss: Tensor | float | None) -> float:
        """Average the gradients and the loss over all workers, and clip the gradients; return the loss."""
        self._flat.check_spent(self._worker.update.members)
        mean = self._loop.average(loss, self.said[1])
        if self._config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._flat.parameters, self._config.clip)
        return mean

    def first_step(self, which: int, step: Callable[[], Any]) -> Any:
        """Take the first half of a step as `evaluate` does; the script evaluates the loss itself, before `second_step`."""
        if self._inside_step:  # called by the optimizer's own step(closure)
            return step()
        return step() if self._begin_own_step(which) else None

    def second_step(self, which: int, step: Callable[[], Any]) -> Any:
        """Take the second half of a step, with the gradients averaged over all workers; the server takes the new weights."""
        if self._inside_step:
            return step()
        if not self._own_step or self._own_step.which != which:
            raise RuntimeError("optimizer.second_step(): given no first_step() before it, expected one")
        if not self._own_step.taken:
            self._own_step = None
            self._flat.clear()  # as the two halves may, which are not executed
            return None
        self._combine(None)
        return self._end_own_step(step, [])

    def swap(self, which: int, swap: Callable[[], Any]) -> Any:
        """Let the optimizer swap the weights on every worker alike; the server takes new ones, in a round without samples."""
        if self._inside_step:
            return swap()
        if not self._begin_own_step(which, averages=False):
            self._own_step = None
            return None
        self._worker.lead()
        return self._end_own_step(swap, [], steps=False)

    def _begin_own_step(self, which: int, averages: bool = True) -> bool:
        """Let the model have weights of its own; return whether the step is to be taken.

        Args:
            which: the index of the optimizer.
            averages: whether the step may begin with the gradient that is there.
        """
        optimizer, loop, worker = self.optimizers[which], self._loop, self._worker
        if self._own_step:
            raise RuntimeError("a step after optimizer.first_step(): given another one, expected optimizer.second_step()")
        if not worker.mode.gradients:
            raise ConfigError(
                f"optimizer: given {type(optimizer).__name__}, which steps on the workers, with mode {self._config.mode}, "
                f"allowed: mode sync"
            )
        if worker.missed_steps and isinstance(optimizer, torch.optim.LBFGS):
            raise RuntimeError(
                "optimizer.step(closure): given LBFGS on a worker that has taken fewer steps than others, so that its history "
                "is another; expected as many steps on all workers, as with drop_last=True and equal shares of the data"
            )
        self._turn_to(which)
        self._keeping.own_state.add(which)
        give_state_back(optimizer)
        loop.drain()
        flat, taken = self._flat, not loop.made()
        self._own_step = OwnStep(which, flat.weights, worker.status.more, taken)
        if taken:
            worker.status.more = True  # a run that is preempted takes the whole step
            if averages and not isinstance(optimizer, torch.optim.LBFGS):  # which evaluates it itself
                self._combine(None)
            flat.rehang_weights(flat.weights.clone())
        return taken

    def _end_own_step(self, step: Callable[[], Any], losses: list[float], steps: bool = True) -> Any:
        """Take the step, and let the server take the new weights.

        Args:
            step: steps the model's weights.
            losses: the losses that the step has evaluated, the first one at the weights before; it may append to them.
            steps: whether the batches since the last step are behind the new weights.
        """
        own, flat = self._own_step, self._flat
        assert own
        self._inside_step = True
        try:
            result = step()
            weights = flat.gathered()
        finally:
            flat.rehang_weights(own.pulled)
            self._worker.status.more, self._own_step, self._inside_step = own.more, None, False
        if not steps and torch.equal(weights, own.pulled):  # on all workers: frameworks call `train` before each step
            self._loop.end_call()
            return result
        given = self.said[0]
        loss = losses[0] if losses else float("nan") if given is None else as_number(given)
        self._loop.adopt(weights, loss, self.said, steps)
        return result

    @property
    def skipped(self) -> bool:
        """Whether the last round took no step because a GradScaler had found an Inf or NaN."""
        return bool(self._worker.control.skipped)

    def state_of(self, which: int) -> dict[int, Any] | None:
        """Return the state of the optimizer `which` as its `state_dict` has it; None if the optimizer has it already."""
        worker = self._worker
        if which in self._keeping.own_state:
            return None
        if worker.inner:
            return None if worker.replica.wire_is_grad else self._numbered(which, worker.inner.state_dict())
        if self._alone:
            return None
        if isinstance(worker, Client):
            raise RuntimeError(
                f"optimizer.state_dict() in mode {self._config.mode}, where the server answers one worker at a time; the state "
                f"is in the checkpoints (ps.save())"
            )
        self._loop.made()
        tree = worker.optimizer_state()
        self._loop.obey()
        self._loop.end_call()
        return self._numbered(which, tree)

    def _steps_with(self, which: int) -> FlatOptimizer | None:
        """Return the optimizer that steps on this rank in place of the script's; None if there is none."""
        if which in self._keeping.own_state:
            return None
        worker, server = self._worker, self._server
        return worker.inner or (server.optimizer if server and self._alone else None)

    def elsewhere(self, which: int) -> bool:
        """Return whether the state of the optimizer `which` is not its own: with the server, or with master weights."""
        own = which in self._keeping.own_state or any(self._evaluates[which])
        return not own and (self._steps_with(which) is None or not self._worker.replica.wire_is_grad)

    def check_loadable(self, which: int) -> None:
        """Raise RuntimeError if the state of the optimizer `which` is on another rank's server."""
        if which not in self._keeping.own_state and self._steps_with(which) is None:
            raise RuntimeError(
                "optimizer.load_state_dict() after connect: the state lies with the server, expected to be loaded before "
                "connect; a run goes on from its checkpoint by --mpips.resume auto"
            )

    def take_over_state(self, which: int) -> None:
        """Give the state that the script has loaded into the optimizer `which` to the optimizer that steps in its place."""
        if stepping := self._steps_with(which):
            stepping.take_state(self.optimizers[which], which)

    def _numbered(self, which: int, tree: dict[str, Any]) -> dict[int, Any]:
        """Return an optimizer's state with the keys of `state_dict`, parameter indices, given its tree by name."""
        flat, state = self._flat, tree["optimizer"]["state"]
        names: dict[Tensor, str] = {p: slot.name for p, slot in zip(flat.parameters, flat.slots, strict=True)}
        order = [names.get(p) for group in self.optimizers[which].param_groups for p in group["params"]]
        return {number: dict(state[name]) for number, name in enumerate(order) if name in state}
