"""What ranks send besides tensors: a row of numbers to the server, the control from the server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from mpips.model.flat import ALIGNMENT

ROUNDS = 1 << 20  # a row carries its round modulo this


@dataclass
class WorkerStatus:
    """One rank's row: the fixed columns of the tail.

    Attributes:
        samples: the number of samples behind the contribution.
        weight: the factor on the contribution; 0 if it does not count.
        loss: the sum of the loss over the samples.
        bad: 1 + the index of the first tensor that is not finite; 0 if all are finite.
        done: 1 if this rank's shard is exhausted.
        stop: 1 if this rank asks to end the run, 2 if it has left its loop, 3 if it has closed.
        signal: 1 if it was told to write a checkpoint and end.
        round: this rank's round, modulo ROUNDS; in a request, the version of its weights.
        train, wait: seconds since the last round spent outside and inside the communicator.
        steps: the number of local steps behind the contribution, times its weight.
        tickets: the number of dealt batches that are used up with this step.
        want: what the answer to this request is to contain, see `server/parameter_server/request.py`.
        call: the `Call` that this worker waits in; 0 while it steps.
        begun: the number of loops over data that this worker has begun.
        digest: a 24-bit digest of the data that all workers must agree on; 0 if there is nothing to compare.
        drawn: the number of batches drawn in the present loop.
        epochs: the number of epochs of the script's loop; 0 if unknown.
        which: the index of the optimizer that steps, if the script has several.
        adopt: 1 if the contribution is new weights, which the server takes as they are.
        overflow: 1 if the script's GradScaler has found an Inf or NaN: no rank is to step.
        more: 1 if the script may take further steps on this worker's present batch.
        stepped: 1 if this worker has taken a step in the present loop.
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
    more: float = 0
    stepped: float = 0


COLUMNS = tuple(vars(WorkerStatus()))
SAMPLES, WEIGHT, LOSS, BAD, DONE, STOP, SIGNAL, ROUND, TRAIN, WAIT, STEPS, TICKETS, WANT = range(13)  # indices of the columns
CALL, BEGUN, DIGEST, DRAWN, EPOCHS, WHICH, ADOPT, OVERFLOW, MORE, STEPPED = range(13, len(COLUMNS))


class Call(IntEnum):
    """A call that a worker waits in until all workers do."""

    NONE = 0
    LOOP = 1  # the end of a loop over data
    VALIDATE = 2
    SAVE = 3
    EPOCH = 4  # the end of an epoch of `ps.epochs`
    FINISH = 5  # the end of the last epoch
    LEAVE = 6  # the end of the script
    STATE = 7  # the optimizer's state; the other workers need not make this call
    AVERAGE = 8  # the average of all workers' gradients, without a step
    BEGIN = 9  # the beginning of a loop over sharded data
    MEET = 10  # a barrier that also broadcasts a text from worker 0
    PAUSE = 11  # the end of a batch, in a run that is preempted there

    @property
    def text(self) -> str:
        """The call as it appears in the script."""
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
            Call.PAUSE: "the end of a batch",
        }[self]


class Stop(IntEnum):
    """The reason why the run ends."""

    NO = 0
    PATIENCE = 1
    TARGET = 2
    REQUESTED = 3
    LEFT = 4  # some workers have left their loops
    PREEMPTED = 5
    ENDED = 6  # all workers have left


@dataclass
class Control:
    """What the server sends to all ranks in front of the weights.

    Attributes:
        round: the number of rounds done, which is the index of the next round.
        version: the number of server updates done.
        active: the number of workers whose shard is not exhausted.
        stop: a `Stop`.
        checkpoint: 1 if all ranks are to take part in a checkpoint now.
        lr: the learning rate of the first parameter group.
        loss: the mean loss over the round's samples.
        culprit: the rank whose update is not finite and ends the run, else -1.
        slot: the index of the culprit's first tensor that is not finite.
        call: the `Call` that all workers have made and that is answered now.
        fault: 1 if the server is about to tell all ranks why no rank can continue.
        skipped: 1 if no step was taken in this round because a GradScaler has found an Inf or NaN.
        ticket: the index of the batch dealt to this worker; -1 if there is none left.
        preempting: 1 if the run is preempted once all workers have taken the steps of their batches.
        again: 1 if this worker has given its state for the checkpoint and is to repeat its request.
        chief: the number of the first worker that lives, which validates, prints and tells what all have in common.
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
    preempting: float = 0
    again: float = 0
    chief: float = 0


WORDS = len(vars(Control()))  # float64
CONTROL_BYTES = -(-8 * WORDS // ALIGNMENT) * ALIGNMENT
