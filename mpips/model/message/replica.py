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
    """Workers that do not make the same calls, or contradict each other. Names the calls, the workers and their ranks."""


class WorkersLostError(CallError):
    """Workers have died without which the run cannot go on. The message names them and their ranks."""


class NonFiniteError(RuntimeError):
    """An update that holds a NaN or Inf. The message names the rank, the tensor and the round."""


class Replica:
    """This rank's copy of the model, laid out flat inside the two messages.

    Attributes:
        flat: the model's parameters. Their data are views of `pull`, unless `apart`. Their gradients are views of `push`, if
            the dtypes agree.
        buffers: the model's buffers.
        push, pull: the messages.
        fragments: the parts of the push message that take turns, one a round; a single part, the whole message, unless it has
            been cut.
        wire_is_grad: whether gradients accumulate directly in the push message.
        apart: whether the model's weights have memory of their own instead of being views of the pull message.
        handed: whether the gradients were copied to the push message one by one during backward.
        keeps_push: whether no other rank writes to this rank's push message in a round.
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
        flat.attach_grad(self.push.gradients if self.wire_is_grad else flat.zeros())

    def move(self, push: Tensor, pull: Tensor, fill: bool, apart: bool, raw: bool) -> None:
        """Move the messages into memory that the node's ranks share.

        Args:
            push: the memory of this rank's push message.
            pull: the memory of the pull message, common to all ranks of the node.
            fill: whether this rank copies its pull message there; the other ranks' are identical.
            apart: whether the model keeps weights of its own.
            raw: whether gradients are multiplied by their weights only when they are reduced.
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
        """Copy a parameter's complete gradient to the push message, unless it accumulates there."""
        self.handed = True
        if not self.wire_is_grad:
            span = self.flat.slots[number].span
            self.push.gradients[span].copy_(self.flat.grad[span])

    def cut(self, count: int, allocate: Allocate) -> None:
        """Cut the parameters into `count` fragments of whole, adjacent parameters, as equal in size as possible.

        Raises:
            ConfigError: there are fewer parameters than fragments.
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
        memory = allocate(length, push.message.dtype, push.message.device)  # shared by all fragments: one travels at a time
        self.fragments = [Fragment(push, *where, memory) for where in zip(slots, spans, strict=True)]

    def fragment(self, round: float) -> Push:
        """Return the part of the push message that a round is about: `push` itself, unless it has been cut."""
        return self.fragments[int(round) % len(self.fragments)]

    def pull_for(self, round: float) -> list[Tensor]:
        """Return the parts of the pull message that travel in this round."""
        return [self.pull.message] if len(self.fragments) == 1 else self.pull.parts(self.fragment(round).span)

    def clear(self) -> None:
        """Empty the push message: set it to zero, and gradients to None."""
        self.push.message.zero_()
        self.flat.clear()

    @property
    def everything(self) -> list[Tensor]:
        """All tensors that ranks must agree on before the first round; the pull message comes first."""
        rest = [p.data for p in self.flat.frozen.values()]
        return [self.pull.message, *rest, *self.buffers.named.values()]

    def check_finite(self, control: Control) -> None:
        """Raise NonFiniteError if the server has ended the run because of an update that is not finite."""
        if control.culprit >= 0:
            raise NonFiniteError(
                f"rank {control.culprit:.0f} has a NaN or Inf in the gradient of {self.flat.slots[int(control.slot)].name}, "
                f"round {control.round:.0f}; no rank has taken the update. Look for the cause there, or choose "
                f'nonfinite="drop" (leave that worker out) or "skip" (skip the round)'
            )


def replicate(model: nn.Module, config: Config, size: int, allocate: Allocate, vectors: int = 1, numbers: int = 0) -> Replica:
    """Lay out `model` flat in messages.

    Args:
        model: the model.
        config: the settings.
        size: the number of rows in the tail.
        allocate: allocates a message, given length, dtype and device.
        vectors: the number of vectors of the weights' length in a message.
        numbers: how many hyperparameters each rank sends.
    """
    flat = Flat(model, hold=False)
    buffers = Buffers(flat.model, config.buffers, wire_dtype(flat.dtype))
    replica = Replica(flat, buffers, size, config.metrics, allocate, vectors, numbers)
    if config.local.fragments > 1:
        replica.cut(config.local.fragments, allocate)
    buffers.store(replica.pull.buffers)
    return replica
