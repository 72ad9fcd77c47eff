"""A rank's copy of the model, laid out in its messages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mpips.config import Config, ConfigError
from mpips.model.buffers import Buffers
from mpips.model.flat import Flat
from mpips.model.message.header import Control
from mpips.model.message.pull import Pull
from mpips.model.message.push import Allocate, Fragment, Push, wire_dtype


class CallError(RuntimeError):
    """Workers that do not make the same calls, or do not say the same: names the calls, the workers and their ranks."""


class NonFiniteError(RuntimeError):
    """An update that holds a NaN or Inf: names the rank, the tensor and the round."""


class Replica:
    """This rank's copy of the model, laid out flat inside the two messages.

    Attributes:
        flat: the model's parameters; their data are views of `pull`, unless `apart`, and their gradients of `push` where the
            dtypes agree.
        buffers: the model's buffers.
        push, pull: the messages.
        fragments: what of the push message travels, one in a round, in turn: all of it, unless it has been cut.
        wire_is_grad: whether gradients accumulate directly in the push message.
        apart: whether the model's weights are this rank's own and not those in the pull message.
        handed: whether the gradients have been handed to the push message one by one, during backward.
        keeps_push: whether no rank writes to this rank's push message in a round.
        active: what of the flat buffer the round is about, where ranks share memory and it is not all of it.
    """

    def __init__(
        self,
        flat: Flat,
        buffers: Buffers,
        size: int,
        metrics: Sequence[str],
        allocate: Allocate,
        vectors: int = 1,
        numbers: int = 0,
    ) -> None:
        self.flat, self.buffers = flat, buffers
        self.push = Push(flat, buffers, size, metrics, allocate, vectors, numbers)
        self.fragments = [self.push]
        self.pull = Pull(flat, buffers, allocate, vectors)
        flat.attach_weights(self.pull.weights)
        self.wire_is_grad = self.push.message.dtype == flat.dtype
        self.apart = self.handed = self.keeps_push = False
        self.active: slice | None = None
        flat.attach_grad(self.push.gradients if self.wire_is_grad else flat.zeros())

    def move(self, push: Tensor, pull: Tensor, fill: bool, apart: bool, raw: bool) -> None:
        """From now on the messages lie in memory that ranks share: `push` is this rank's, `pull` everybody's.

        Args:
            fill: whether this rank is to fill the pull message with its own; the others' are the same.
            apart: whether the model keeps weights of its own.
            raw: whether gradients are multiplied by their weights only where they are combined.
        """
        old = self.pull.message
        self.push.move(push, raw)
        self.pull.lay_out(pull)
        if fill:
            pull.copy_(old)
        self.apart = apart
        if apart:
            self.flat.attach_weights(self.flat.zeros())
        else:
            self.flat.rehang_weights(self.pull.weights)
        if self.wire_is_grad:
            self.flat.attach_grad(self.push.gradients)

    def hand(self, number: int) -> None:
        """A parameter's gradient is complete: it comes to the push message, if it is not there."""
        self.handed = True
        if not self.wire_is_grad:
            span = self.flat.slots[number].span
            self.push.gradients[span].copy_(self.flat.grad[span])

    def cut(self, count: int, allocate: Allocate) -> None:
        """Let so many fragments take turns: whole parameters, neighbours, each cut where it is nearest to equal shares.

        Raises:
            ConfigError: there are fewer parameters.
        """
        starts, push, numel = [slot.offset for slot in self.flat.slots], self.push, self.flat.numel
        if count > len(starts):
            raise ConfigError(f"local.fragments: given {count}, allowed: up to {len(starts)}, the model's trained tensors")
        cuts = [0]
        for number in range(1, count):
            places = range(cuts[-1] + 1, len(starts) - count + number + 1)
            cuts.append(min(places, key=lambda at: abs(starts[at] * count - numel * number)))
        spans = [slice(*pair) for pair in pairwise([*(starts[at] for at in cuts), numel])]
        slots = [slice(*pair) for pair in pairwise([*cuts, len(starts)])]
        length = max(span.stop - span.start for span in spans) + push.message.numel() - numel
        room = allocate(length, push.message.dtype, push.message.device)  # for all of them: one travels at a time
        self.fragments = [Fragment(push, *where, room) for where in zip(slots, spans, strict=True)]

    def push_for(self, round: float) -> Push:
        """What travels to the server in this round, filled from `push`; the server spills back what came of it."""
        self.active = None
        push = self.fragments[int(round) % len(self.fragments)]
        if not isinstance(push, Fragment):
            return push
        if self.push.shared:
            push.confine()
            self.active = push.span
            return self.push
        push.fill()
        return push

    def pull_for(self, round: float) -> list[Tensor]:
        """What travels back in this round."""
        count = len(self.fragments)
        return [self.pull.message] if count == 1 else self.pull.parts(self.fragments[int(round) % count].span)

    def clear(self) -> None:
        """Nothing to push: zero gradients, empty tail."""
        self.push.message.zero_()
        self.flat.clear()

    @property
    def everything(self) -> list[Tensor]:
        """All that the ranks must have alike before the first round, the pull message first."""
        rest = [p.data for p in self.flat.frozen.values()]
        return [self.pull.message, *rest, *self.buffers.named.values()]

    def check_finite(self, control: Control) -> None:
        """Raise NonFiniteError if the server ended the run for it."""
        if control.culprit >= 0:
            raise NonFiniteError(
                f"rank {control.culprit:.0f} has a NaN or Inf in the gradient of {self.flat.slots[int(control.slot)].name}, "
                f"round {control.round:.0f}; no rank has taken the update. Look for the cause there, or choose "
                f'nonfinite="drop" (leave that worker out) or "skip" (skip the round)'
            )


def replicate(model: nn.Module, config: Config, size: int, allocate: Allocate, vectors: int = 1, numbers: int = 0) -> Replica:
    """Lay `model` out flat, in messages with `size` rows, `vectors` of the weights' length and `numbers` of an optimizer."""
    flat = Flat(model, hold=False)
    buffers = Buffers(flat.model, config.buffers, wire_dtype(flat.dtype))
    replica = Replica(flat, buffers, size, config.metrics, allocate, vectors, numbers)
    if config.local.fragments > 1:
        replica.cut(config.local.fragments, allocate)
    buffers.store(replica.pull.buffers)
    return replica
