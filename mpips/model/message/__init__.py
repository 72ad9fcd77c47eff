"""The two messages of a round, each one tensor that is allocated once: Push to the server, Pull from the server.

    Push  float32 or float64   | gradients | float buffers | second || integer buffers | presence | numbers, rows |
    Pull  bytes                | control   | weights (the model's dtype)     | second | buffers                        |

Modes with local steps push the new weights, or their change, in place of the gradients. `second` is a further vector of the
gradients' length, for modes that need one (SCAFFOLD's control variates). `presence` says which tensors have a gradient;
`numbers` are the optimizers' hyperparameters.

Left of `||` is the body, which the rule combines; right of it is the tail, which is summed. A rank writes its own row of the
tail and leaves the others zero, so the sum is a gather: counts, losses, flags and metrics of every rank, without a further
message. Everything in the tail is exact in float32: counts are below 2^24, and integers are split into four 16-bit limbs. With
`local.fragments` a round is about some of the parameters: only their gradients and weights travel, with everything else.
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
from mpips.model.message.push import Allocate, Contribution, Fragment, Push, ReducedTail, wire_dtype
from mpips.model.message.replica import CallError, NonFiniteError, Replica, WorkersLostError, replicate

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
    "WorkersLostError",
    "replicate",
    "wire_dtype",
]
