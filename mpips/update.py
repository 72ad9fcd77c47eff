"""What a worker computes between pull and push: the update.

An update fills the push message: the body with its contribution times a weight, the tail with this rank's row. Contributions
are sums over samples, so that empty shards and uneven batches need no protocol of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpips.message import Replica, Row


class Gradient:
    """The gradient of the mean loss over this step's samples.

    Args:
        replica: where the gradient accumulated and where it goes.
        rank: this rank.
        index, workers: this worker's number, from 0, and how many there are.
    """

    def __init__(self, replica: Replica, rank: int, index: int, workers: int) -> None:
        self.replica, self.rank, self.first, self.alone = replica, rank, index == 0, workers == 1

    def write(self, row: Row, metrics: Sequence[float], loss_scale: float) -> None:
        """Fill the push message; sets the row's `weight` and `bad`, and a bad row's samples and loss to 0.

        A single worker's weight is 1 and not its samples: (n g) / n would differ from g in the last bit.
        """
        flat, push = self.replica.flat, self.replica.push
        present = flat.collect()
        if not self.replica.wire_is_grad:
            push.gradients.copy_(flat.grad)
        if loss_scale != 1:
            push.gradients.div_(loss_scale)
        bad = flat.first_nonfinite(push.gradients)
        if bad is not None:  # its loss is as useless as its gradient
            row.bad, row.samples, row.loss, metrics = 1 + bad, 0, 0, [0.0] * len(metrics)
        row.weight = float(row.samples > 0) if self.alone else row.samples
        push.message[push.gradients.numel() :].zero_()
        self.replica.buffers.write(push.floats, push.limbs, row.weight, self.first)
        if row.weight:
            push.presence.copy_(push.presence.new_tensor(present))
            if row.weight != 1:
                push.gradients.mul_(row.weight)
        else:
            push.body.zero_()
        push.write(self.rank, row, metrics)

    def write_nothing(self, row: Row, metrics: int) -> None:
        """Fill the push message of a rank that has no data left; gradients not yet pushed stay where they are.

        Args:
            row: this rank's row.
            metrics: the number of extra metrics.
        """
        push = self.replica.push
        push.message.zero_()
        self.replica.buffers.write(push.floats, push.limbs, 0, self.first)
        push.write(self.rank, row, [0.0] * metrics)
