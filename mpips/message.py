"""The two messages of a round, each one tensor that is allocated once: Push to the server, Pull back.

    Push  float32 or float64   | gradients | float buffers | second || integer buffers | presence | one row per rank |
    Pull  bytes                | control   | weights (the model's dtype)     | second | buffers                        |

Modes with local steps push the new weights, or their change, in the gradients' place. `second` is a further vector of that
length which a mode may need (scaffold's control variates). Left of `||` is the body, which a rule combines; right of it the
tail, which is summed. A rank writes its own row of the tail and leaves the others zero, so the sum is all rows: counts, losses,
flags and metrics of every rank, without a message more.
All of the tail is exact in float32: counts below 2^24, and integers in four limbs of 16 bits.
With `local.fragments` a round is about some of the parameters: theirs of the gradients and of the weights travel, and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor, nn

from mpips.buffers import Buffers
from mpips.config import Config, ConfigError
from mpips.flat import ALIGNMENT, Flat

LIMBS = 4  # 16-bit pieces of an int64
ROUNDS = 1 << 20  # a row carries its round modulo this

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]


class NonFiniteError(RuntimeError):
    """An update that holds a NaN or Inf: names the rank, the tensor and the round."""


@dataclass
class Row:
    """What one rank says of its step: the tail's fixed columns.

    Attributes:
        samples: samples behind the contribution.
        weight: what the contribution was multiplied by; 0 when it does not count.
        loss: sum over samples of the loss.
        bad: 1 + the index of the first tensor that is not finite; 0 when all are.
        done: 1 when this rank's shard is exhausted.
        stop: 1 when this rank asks to end the run, 2 when it has left its loop, 3 when it has closed.
        signal: 1 when it was told to write a checkpoint and end.
        round: the round this rank believes to be in, modulo ROUNDS; in a request the version of its weights.
        train, wait: seconds since the last round spent outside and inside the exchange.
        steps: local steps behind the contribution, times its weight.
        tickets: dealt batches that are used up with this step.
        want: what the answer to this request is to bring, see `parameter_server/request.py`.
    """

    samples: float = 0
    weight: float = 0
    loss: float = 0
    bad: float = 0
    done: float = 0
    stop: float = 0
    signal: float = 0
    round: float = 0
    train: float = 0
    wait: float = 0
    steps: float = 0
    tickets: float = 0
    want: float = 0


COLUMNS = tuple(asdict(Row()))


class Stop(IntEnum):
    """Why the run ends."""

    NO = 0
    PATIENCE = 1
    TARGET = 2
    REQUESTED = 3
    LEFT = 4  # some workers have left their loops
    PREEMPTED = 5
    ENDED = 6  # all workers have


@dataclass
class Control:
    """What the server says to all ranks, in front of the weights.

    Attributes:
        round: rounds done; the next one's number.
        version: server updates done.
        active: training ranks whose shard is not exhausted.
        stop: a `Stop`.
        checkpoint: 1 when all ranks are to write a checkpoint now.
        loss_scale: what to multiply the next loss by.
        lr: learning rate of the first parameter group.
        loss: mean loss over the round's samples.
        culprit: the rank whose update is not finite and ends the run, else -1.
        slot: the index of its first such tensor.
        value: the last validation's value.
        ticket: the batch dealt to this worker; -1 when there is none left.
        again: 1 when this worker is to ask again, having given its state for the checkpoint.
    """

    round: float = 0
    version: float = 0
    active: float = 0
    stop: float = 0
    checkpoint: float = 0
    loss_scale: float = 1
    lr: float = 0
    loss: float = 0
    culprit: float = -1
    slot: float = 0
    value: float = float("nan")
    ticket: float = -1
    again: float = 0


CONTROL_BYTES = -(-8 * len(asdict(Control())) // ALIGNMENT) * ALIGNMENT


def wire_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """What a model's gradients travel in: MPI cannot sum 16-bit floats, and the server steps on float32 masters."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


class Push:
    """The message to the server.

    Attributes:
        message: all of it.
        tail_at: where the tail begins.
        gradients, floats, limbs, presence: views of its parts.
        second: a further view of the gradients' length; None where the mode has none.
        rows: `(size, columns)` view, one row per rank.
        span: the elements of the flat buffer that it is about.
    """

    def __init__(
        self, flat: Flat, buffers: Buffers, size: int, metrics: Sequence[str], allocate: Allocate, vectors: int = 1
    ) -> None:
        dtype = wire_dtype(flat.weights.dtype)
        self.columns = COLUMNS + tuple(metrics)
        lengths = [
            flat.numel,
            buffers.float_numel,
            (vectors - 1) * flat.numel,
            LIMBS * buffers.integer_numel,
            len(flat.slots),
            size * len(self.columns),
        ]
        self.span = slice(0, flat.numel)
        self._lay_out(allocate(sum(lengths), dtype, flat.weights.device), lengths)

    def _lay_out(self, room: Tensor, lengths: list[int]) -> None:
        self.lengths, self.message = lengths, room[: sum(lengths)]
        self.gradients, self.floats, second, self.limbs, self.presence, rows = torch.split(self.message, lengths)
        self.second = second if lengths[2] else None
        self.rows = rows.view(-1, len(self.columns))
        self.tail_at = sum(lengths[:3])

    def fill(self) -> None:
        """Take what is to be sent from the whole message: it is this."""

    def spill(self) -> None:
        """Put what has come into the whole message."""

    @property
    def body(self) -> Tensor:
        """What a rule combines."""
        return self.message[: self.tail_at]

    def write(self, rank: int, row: Row, metrics: Sequence[float]) -> None:
        """Say `row` and the metrics' sums for this rank; a request has one row, whoever makes it."""
        values = [*asdict(row).values(), *metrics]
        self.rows[rank if len(self.rows) > 1 else 0].copy_(torch.tensor(values, dtype=self.message.dtype))


class Fragment(Push):
    """The message of neighbouring `slots`, which take up `span`: their part of the gradients, and all that lies behind."""

    def __init__(self, whole: Push, slots: slice, span: slice, room: Tensor) -> None:
        self.whole, self.slots, self.span, self.columns = whole, slots, span, whole.columns
        self._lay_out(room, [span.stop - span.start, *whole.lengths[1:]])

    def fill(self) -> None:
        """See `Push`; the other parameters count as absent, so the server passes over them."""
        self.gradients.copy_(self.whole.gradients[self.span])
        self.message[self.lengths[0] :].copy_(self.whole.message[self.whole.lengths[0] :])
        self.presence[: self.slots.start].zero_()
        self.presence[self.slots.stop :].zero_()

    def spill(self) -> None:
        """See `Push`."""
        self.whole.gradients.zero_()
        self.whole.gradients[self.span].copy_(self.gradients)
        self.whole.message[self.whole.lengths[0] :].copy_(self.message[self.lengths[0] :])


class Pull:
    """The message back.

    Attributes:
        message: all of it, as bytes.
        weights: view in the model's dtype.
        second: a view like it, in the wire's dtype; None where the mode has none.
        buffers: views, in the order of `Buffers.tensors`.
    """

    def __init__(self, flat: Flat, buffers: Buffers, allocate: Allocate, vectors: int = 1) -> None:
        wire = wire_dtype(flat.weights.dtype)
        sizes = [flat.numel * flat.weights.element_size(), (vectors - 1) * flat.numel * wire.itemsize]
        sizes += [t.numel() * t.element_size() for t in buffers.tensors]
        starts, end = [], CONTROL_BYTES
        for size in sizes:
            starts.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.message = allocate(end, torch.uint8, flat.weights.device)
        spans = [self.message[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self.weights = spans[0].view(flat.weights.dtype)
        self.second = spans[1].view(wire) if vectors > 1 else None
        self.buffers = [span.view(t.dtype).view(t.shape) for span, t in zip(spans[2:], buffers.tensors, strict=True)]
        self._behind = self.message[starts[1] :]

    def parts(self, span: slice) -> list[Tensor]:
        """The message in pieces; of the weights these alone."""
        return [part for part in (self.control_message, self.weights[span], self._behind) if part.numel()]

    @property
    def control_message(self) -> Tensor:
        """The control alone, for what is said between rounds."""
        return self.message[:CONTROL_BYTES]

    @property
    def control(self) -> Control:
        """What the server said last."""
        values = self.control_message.view(torch.float64).tolist()
        return Control(*values[: len(asdict(Control()))])

    @control.setter
    def control(self, said: Control) -> None:
        values = torch.tensor(list(asdict(said).values()), dtype=torch.float64)
        self.control_message.view(torch.float64)[: len(values)].copy_(values)


class Replica:
    """This rank's copy of the model, laid out flat inside the two messages.

    Attributes:
        flat: the model's parameters; their data are views of `pull`, their gradients of `push` where the dtypes agree.
        buffers: the model's buffers.
        push, pull: the messages.
        fragments: what of the push message travels, one in a round, in turn: all of it, unless it has been cut.
        wire_is_grad: whether gradients accumulate directly in the push message.
    """

    def __init__(
        self, flat: Flat, buffers: Buffers, size: int, metrics: Sequence[str], allocate: Allocate, vectors: int = 1
    ) -> None:
        self.flat, self.buffers = flat, buffers
        self.push = Push(flat, buffers, size, metrics, allocate, vectors)
        self.fragments = [self.push]
        self.pull = Pull(flat, buffers, allocate, vectors)
        flat.attach_weights(self.pull.weights)
        self.wire_is_grad = self.push.message.dtype == flat.weights.dtype
        if self.wire_is_grad:
            flat.attach_grad(self.push.gradients)

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
        push = self.fragments[int(round) % len(self.fragments)]
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


def replicate(model: nn.Module, config: Config, size: int, allocate: Allocate, vectors: int = 1) -> Replica:
    """Lay `model` out flat, in messages with `size` rows and `vectors` of the weights' length."""
    flat = Flat(model)
    buffers = Buffers(flat.model, config.buffers, wire_dtype(flat.weights.dtype))
    replica = Replica(flat, buffers, size, config.metrics, allocate, vectors)
    if config.local.fragments > 1:
        replica.cut(config.local.fragments, allocate)
    buffers.store(replica.pull.buffers)
    return replica
