"""What ranks say beside tensors: a row to the server, the control back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from mpips.flat import ALIGNMENT

ROUNDS = 1 << 20  # a row carries its round modulo this


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


COLUMNS = tuple(vars(Row()))
SAMPLES, WEIGHT, LOSS, BAD, DONE, STOP, SIGNAL, ROUND, TRAIN, WAIT, STEPS, TICKETS, WANT = range(len(COLUMNS))  # their places


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


WORDS = len(vars(Control()))  # float64
CONTROL_BYTES = -(-8 * WORDS // ALIGNMENT) * ALIGNMENT
