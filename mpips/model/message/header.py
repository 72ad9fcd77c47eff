"""What ranks say beside tensors: a row to the server, the control back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from mpips.model.flat import ALIGNMENT

ROUNDS = 1 << 20  # a row carries its round modulo this


@dataclass
class WorkerStatus:
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
        train, wait: seconds since the last round spent outside and inside the communicator.
        steps: local steps behind the contribution, times its weight.
        tickets: dealt batches that are used up with this step.
        want: what the answer to this request is to bring, see `server/parameter_server/request.py`.
        call: the `Call` that this worker waits in; 0 while it steps.
        begun: loops over data that this worker has begun.
        digest: of the data that all workers must have alike, 24 bits; 0 when there is nothing to compare.
        drawn: batches drawn in the loop in progress.
        epochs: how many epochs the script's loop has; 0 when it has not said.
        which: the number of the optimizer that steps, of several.
        adopt: 1 when the contribution is new weights, to be taken as they are.
        overflow: 1 when the script's GradScaler has found an Inf or NaN: no rank is to step.
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
    call: float = 0
    begun: float = 0
    digest: float = 0
    drawn: float = 0
    epochs: float = 0
    which: float = 0
    adopt: float = 0
    overflow: float = 0


COLUMNS = tuple(vars(WorkerStatus()))
SAMPLES, WEIGHT, LOSS, BAD, DONE, STOP, SIGNAL, ROUND, TRAIN, WAIT, STEPS, TICKETS, WANT = range(13)  # their places
CALL, BEGUN, DIGEST, DRAWN, EPOCHS, WHICH, ADOPT, OVERFLOW = range(13, len(COLUMNS))


class Call(IntEnum):
    """What a worker waits in, until all workers do."""

    NONE = 0
    LOOP = 1  # the end of a loop over data
    VALIDATE = 2
    SAVE = 3
    EPOCH = 4  # the end of an epoch of `ps.epochs`
    FINISH = 5  # the end of the last one
    LEAVE = 6  # the end of the script
    STATE = 7  # the optimizer's state, for whoever asks: the others need not wait for it
    AVERAGE = 8  # the gradient of all workers, without a step
    BEGIN = 9  # the beginning of a loop over data that is divided
    MEET = 10  # a barrier, at which worker 0 may have something to say

    @property
    def text(self) -> str:
        """As the script wrote it."""
        return {
            Call.NONE: "a step",
            Call.LOOP: "the end of a loop over its shard",
            Call.VALIDATE: "ps.validate()",
            Call.SAVE: "ps.save()",
            Call.EPOCH: "the end of an epoch of ps.epochs()",
            Call.FINISH: "the end of ps.epochs()",
            Call.LEAVE: "the end of its script",
            Call.STATE: "optimizer.state_dict()",
            Call.AVERAGE: "ps.average() or the clipping of gradients",
            Call.BEGIN: "the beginning of a loop over its shard",
            Call.MEET: "a barrier",
        }[self]


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
        lr: learning rate of the first parameter group.
        loss: mean loss over the round's samples.
        culprit: the rank whose update is not finite and ends the run, else -1.
        slot: the index of its first such tensor.
        call: the `Call` that all workers have made, and that is answered now.
        fault: 1 when the server has to say why no rank can go on, to all ranks at once.
        skipped: 1 when no step was taken in this round, because a GradScaler has found an Inf or NaN.
        ticket: the batch dealt to this worker; -1 when there is none left.
        again: 1 when this worker is to ask again, having given its state for the checkpoint.
    """

    round: float = 0
    version: float = 0
    active: float = 0
    stop: float = 0
    checkpoint: float = 0
    lr: float = 0
    loss: float = 0
    culprit: float = -1
    slot: float = 0
    call: float = 0
    fault: float = 0
    skipped: float = 0
    ticket: float = -1
    again: float = 0


WORDS = len(vars(Control()))  # float64
CONTROL_BYTES = -(-8 * WORDS // ALIGNMENT) * ALIGNMENT
