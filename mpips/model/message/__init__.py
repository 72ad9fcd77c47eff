"""The two messages of a round, each one tensor that is allocated once: Push to the server, Pull back.

    Push  float32 or float64   | gradients | float buffers | second || integer buffers | presence | numbers, rows |
    Pull  bytes                | control   | weights (the model's dtype)     | second | buffers                        |

Modes with local steps push the new weights, or their change, in the gradients' place. `second` is a further vector of that
length which a mode may need (scaffold's control variates). Left of `||` is the body, which a rule combines; right of it the
tail, which is summed. A rank writes its own row of the tail and leaves the others zero, so the sum is all rows: counts, losses,
flags and metrics of every rank, without a message more.
All of the tail is exact in float32: counts below 2^24, and integers in four limbs of 16 bits.
With `local.fragments` a round is about some of the parameters: theirs of the gradients and of the weights travel, and the rest.
"""

from mpips.model.message.header import (
    ADOPT,
    BAD,
    BEGUN,
    CALL,
    COLUMNS,
    CONTROL_BYTES,
    DIGEST,
    DONE,
    DRAWN,
    EPOCHS,
    LOSS,
    OVERFLOW,
    ROUND,
    ROUNDS,
    SAMPLES,
    SIGNAL,
    STEPS,
    STOP,
    TICKETS,
    WEIGHT,
    WHICH,
    Call,
    Control,
    Stop,
    WorkerStatus,
)
from mpips.model.message.pull import Pull
from mpips.model.message.push import LIMBS, Allocate, Contribution, Fragment, Push, ReducedTail, wire_dtype
from mpips.model.message.replica import CallError, NonFiniteError, Replica, replicate

__all__ = [
    "ADOPT",
    "BAD",
    "BEGUN",
    "CALL",
    "COLUMNS",
    "CONTROL_BYTES",
    "DIGEST",
    "DONE",
    "DRAWN",
    "EPOCHS",
    "LIMBS",
    "LOSS",
    "OVERFLOW",
    "ROUND",
    "ROUNDS",
    "SAMPLES",
    "SIGNAL",
    "STEPS",
    "STOP",
    "TICKETS",
    "WEIGHT",
    "WHICH",
    "Allocate",
    "Call",
    "CallError",
    "Contribution",
    "Control",
    "Fragment",
    "NonFiniteError",
    "Pull",
    "Push",
    "ReducedTail",
    "Replica",
    "Stop",
    "WorkerStatus",
    "replicate",
    "wire_dtype",
]
