"""How a resumed run comes to where its checkpoint was taken.

The script is executed from its first line. Until that place is reached the run replays: epochs are left out, loops that are
done yield nothing but one batch, for the names that their bodies set, and calls that are done (steps, validations, checkpoints)
do nothing. Then what the script has changed meanwhile is put back, and the run goes on.
"""

from __future__ import annotations

from mpips.process import rng
from mpips.run.keeping import Keeping
from mpips.worker.round_worker import Worker


class Replay:
    """The calls and loops of this epoch, counted, and whether a resumed run has made them before its checkpoint.

    Args:
        worker: the worker, whose place is the checkpoint's until the run goes on.
        keeping: what the script keeps in the checkpoint.
        streams: the random streams to go on with; None for a new run.
    """

    def __init__(self, worker: Worker, keeping: Keeping, streams: rng.State | None) -> None:
        self._worker, self._keeping, self._streams = worker, keeping, streams
        self.loops = 0  # that have begun in this epoch
        self._calls = 0  # outside loops, since the last loop or the beginning of the epoch
        self._epochs = False  # whether the script is in a loop of `ps.epochs`, or behind it

    @property
    def lost(self) -> bool:
        """Whether the run is resumed and cannot find its place: without epochs and loops there is none."""
        return self._streams is not None and not (self.pending or self._epochs or self.loops)

    @property
    def pending(self) -> bool:
        """Whether the run is resumed and has not come to its place."""
        if self._streams is None:
            return False
        place = self._worker.place
        return self._epochs or place.begun or place.over or place.loop + place.epoch > 0

    @property
    def _ahead(self) -> bool:
        """Whether the run's place is in or behind the next loop, or in a later epoch."""
        place = self._worker.place
        return self.loops < place.loop or place.begun or place.over or (place.epoch > 0 and not self._epochs)

    def next_epoch(self) -> None:
        """Begin an epoch, and go on if the place is its beginning."""
        self.loops, self._calls, self._epochs, place = 0, 0, True, self._worker.place
        self.go_on(not place.loop and not place.begun and not place.over and not place.between)

    def next_loop(self) -> int:
        """Begin a loop, and return its index in the epoch."""
        self.loops, self._calls = self.loops + 1, 0
        return self.loops - 1

    def end_loop(self, loop: int) -> None:
        """End a loop that was done before the checkpoint, and go on if the place is right behind it."""
        place = self._worker.place
        if loop == place.loop:
            calling = place.calling
            place.next_loop()
            place.calling = calling
        self.go_on(loop == place.loop - 1 and not place.begun and not place.over and not place.between)

    def call(self) -> bool:
        """Count a step or call outside loops; return whether it is in the checkpoint already, and is to be skipped."""
        place, number = self._worker.place, self._calls
        self._calls += 1
        if self.pending:
            if self._ahead:
                return True
            if number < place.calls:
                self.go_on(number == place.calls - 1 and not place.calling, stepped=True)
                return True
            self.go_on(True)
        place.calls, place.calling = number, True
        return False

    def will_be_made(self) -> bool:
        """Return what `call` would return for the next call outside loops."""
        return self.pending and (self._ahead or self._calls < self._worker.place.calls)

    def end_call(self) -> None:
        """Note that the call in progress is done, in a checkpoint from now on."""
        if not self.pending:
            self._worker.place.calls, self._worker.place.calling = self._calls, False

    def go_on(self, here: bool, stepped: bool = False) -> None:
        """End the replay if the run's place is `here`.

        Args:
            here: whether it is.
            stepped: whether the gradients that the script has were stepped with before the checkpoint, and stay.
        """
        if here and self._streams is not None:
            self.put_back(stepped)
            self.restore_streams()
            self.forget()

    def restore_streams(self) -> None:
        """Restore the random streams; the replay has ended."""
        assert self._streams is not None
        rng.restore(self._streams)
        self._streams = None

    def put_back(self, stepped: bool = False) -> None:
        """Put back what the script has changed by executing code again, except the random streams; see `go_on`.

        Raises:
            RuntimeError: the script has changed weights.
        """
        self._worker.put_back(gradients=not stepped)
        self._keeping.put_back()

    def forget(self) -> None:
        """Free what `put_back` needs."""
        self._worker.forget()
        self._keeping.forget()
