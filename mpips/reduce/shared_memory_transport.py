"""The transport in memory that the ranks of a node share: each rank combines and steps the slices that it serves.

If rank 0 serves all slices (plan "root"), the other ranks only hand in their push messages. See `mpips.reduce.transport`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpips.comm import Communicator
from mpips.comm.node_group import NodeGroup
from mpips.comm.peer_buffers import Rows
from mpips.comm.reduce_scatter import ReduceScatterGroup
from mpips.model.bucket_ready import BucketReadiness
from mpips.model.finite import all_finite, is_finite
from mpips.model.layout import both
from mpips.model.message import BAD, WEIGHT, Control, Fragment, Replica
from mpips.optim import hyperparameters as hyper
from mpips.optim.flat_optimizer import FlatOptimizer
from mpips.reduce.aggregate import NOTHING, AggregationResult
from mpips.reduce.combine import HUGE, Combiner, Gram, coefficients, left_out, prepare
from mpips.reduce.sharded_optimizer import ShardedOptimizer
from mpips.reduce.transport import Decision, average_by_messages
from mpips.rules import Needs, Rule

TAKE, FACTOR, SCALE, SETTINGS = range(4)  # indices in the decision; the hyperparameters follow
SKIPPED, STEPPED, ADOPTED = 0.0, 1.0, 2.0  # the values at TAKE


class SharedMemoryTransport:
    """One rank's end; see `Transport`.

    Args:
        group: the node group that holds the messages.
        replica: the model, which lies in these messages.
        rule, last: the rule and what the last collective delivers, from `mpips.rules.choose`.
        first: the rank of the first worker.
        optimizer: steps this rank's slices; None if it serves none.
        clip: the largest norm of the combined gradient; None does not clip.
        communicator: this rank's end.
        rounded: as in `Combiner`.

    Attributes:
        faults: `(lines,)` float64, by rank: the index of the first tensor in which its contribution is not finite; else
            infinite.
    """

    def __init__(
        self,
        group: NodeGroup,
        replica: Replica,
        rule: Rule,
        last: Needs,
        first: int,
        optimizer: ShardedOptimizer | FlatOptimizer | None,
        clip: float | None,
        communicator: Communicator,
        rounded: bool,
    ) -> None:
        self.group, self.replica, self._clip, self._last, self._first = group, replica, clip, last, first
        self._push, self._rule, self._optimizer = replica.push, rule, optimizer
        self._prepares = rule.prepares
        self._gradients = replica.flat.numel
        self._alone = len(group.nodes) == 1
        self.plan = "sharded" if group.sharded else "root"
        self.how = _how(group)
        self.encodes = not (self._alone or group.spec.codec.exact)
        self._combiner = Combiner(replica.push, rule, first, rounded)
        self._sums = rule.needs == "sum"
        self._gram: Gram | None = None  # set in the first pass of a rule that needs inner products
        self._unusable: list[int] = []  # the ranks that such a rule has left out
        self._refused = ""
        self._communicator = communicator
        self.ready: BucketReadiness | None = None
        if isinstance(group, ReduceScatterGroup) and group.spec.overlap:
            self.ready = BucketReadiness(group.push_steps, replica.flat.slots)
        self._watches = not (self._alone or group.sharded)  # whether the server alone checks the sum over all nodes
        self._begun: tuple[float, Callable[[], None]] | None = None
        self._moved = False
        self._active: slice | None = None  # the fragment of this round; None for the whole body
        self._faulty = False
        self.faults = torch.full((group.spec.lines,), math.inf, dtype=torch.float64)
        own = hyper.read(optimizer.torch) if isinstance(optimizer, ShardedOptimizer) else []
        self._numbers = slice(SETTINGS, SETTINGS + len(own))
        self._decision = torch.zeros(group.spec.answer, dtype=torch.float64)

    def begin(self, weight: float) -> None:
        """Reduce on another thread, bucket by bucket; see `Transport`."""
        assert self.ready
        if self._begun:
            raise RuntimeError(
                "a second ps.backward() before ps.step(): the gradients of the first are on their way; to accumulate, call "
                "loss.backward() for all batches but the last"
            )
        self.ready.begin()
        self._begun = weight, self._communicator.run_async(partial(self._combine, weight, self.ready))

    def push(self) -> None:
        """Check the weight and let the last buckets go, if `begin` has been called; see `Transport`."""
        if not self._begun:
            return
        weight = self._push.weight(self.group.rank)
        if self._begun[0] != weight:
            raise ValueError(
                f"ps.step() was given samples={weight:.0f} after ps.backward() with samples={self._begun[0]:.0f}; expected the "
                f"same: gradients are weighted before they leave"
            )
        assert self.ready
        self.ready.end()

    def reduce(self, round: float) -> AggregationResult:
        """Combine this rank's slices, or wait until the thread of `begin` has; see `Transport`."""
        fragment = self.replica.fragment(round)
        if isinstance(fragment, Fragment):
            fragment.confine()
            self._active = fragment.span
        begun, self._begun = self._begun, None
        if begun:
            begun[1]()
        else:
            self._combine(self._push.weight(self.group.rank), None)
        for rank in self._combiner.faulty:
            self._faulty, self.faults[rank] = True, 0.0
        reported = self.group.report(self.faults, "min") if self.group.sharded or self._faulty else None
        return self._result(reported) if self.group.leads else NOTHING

    def _result(self, reported: Tensor | None) -> AggregationResult:
        """Return the result of the round, at the server."""
        if reported is None and self._sums and not self._prepares:  # in most rounds
            return NOTHING
        named = {} if reported is None else {n: int(slot) for n, slot in enumerate(reported.tolist()) if slot < math.inf}
        left = left_out(self._push.heard.rows, self._rule)
        if self._sums:
            found = {rank: slot for rank, slot in named.items() if rank or len(named) == 1 or not self.encodes}
            return AggregationResult(sorted(left), nonfinite=found)
        if not self.group.spans:
            self._combiner.ask()
        whole = named.pop(self._communicator.size, None)
        faulty = sorted({*left, *named, *self._unusable})
        return AggregationResult(faulty, self._refused or self._combiner.refused, {} if whole is None else {0: whole})

    def _combine(self, weight: float, ready: BucketReadiness | None) -> None:
        self._combiner.begin(weights=None if self._alone else lambda: self.group.sample_weights.tolist())
        if self._faulty:
            self.faults.fill_(math.inf)
        self._faulty = False
        if self._prepares:
            prepare(self.group.rank, self._push, self._rule)
        if self._rule.needs == "gram":
            self._gram = Gram(self._push, self._rule, self._communicator.size)
        self.group.reduce(weight, self._push.heard.message, self, ready)
        if self._gram:
            self._choose(self._gram)

    def _choose(self, gram: Gram) -> None:
        """Let the rule choose coefficients by the inner products of all slices, and combine the slices by them.

        The products are summed over all ranks. Each rank calls its own rule, which may remember more than the coefficients.
        """
        size, self._gram = self._communicator.size, None
        products, faulty = slice(0, size * size), slice(size * size, size * (size + 1))
        partial = torch.zeros_like(self.faults)
        if gram.called:
            partial[products], partial[faulty] = gram.matrix.flatten(), gram.faulty.double()
        total = self.group.report(partial, "sum")
        if self.group.leads:
            self._decision[: faulty.stop] = total[: faulty.stop]
        self.group.decide(self._decision)
        matrix = self._decision[products].view(size, size).clone()
        usable = (self._decision[faulty] == 0) & (matrix.diagonal() <= HUGE)
        factors, self._unusable, self._refused = coefficients(self._push, self._rule, matrix, usable)
        self._combiner.begin(factors)
        self.group.combine(self)

    def reduce_local(self, part: slice, rows: Rows) -> None:
        """Combine one slice of this group's rows, to their sum or by a rule that needs rows; see `SliceReducer`."""
        if self._active and self._passes(part):
            return
        if self._gram:
            self._gram.add(part, rows)
        elif self._sums:
            self._add(part, rows)
        else:
            written = self._combiner.rows(part, rows, rows[0])
            if written and part.start < self._gradients and not is_finite(rows[0]):
                self._record_fault(self._communicator.size, part, rows[0])

    def _add(self, part: slice, rows: Rows) -> None:
        total = self._combiner.add(part, rows)
        if part.start < self._gradients and not is_finite(total):
            products = {k: rows[k] * factor for k, factor in self._combiner.terms(part) if k}
            guilty = {k: product for k, product in products.items() if not all_finite(product)}
            for k, values in (guilty or {0: rows[0]}).items():  # row 0 holds the sum: at fault if no other row is
                self._record_fault(self.group.members[k], part, values)

    def reduce_remote(self, part: slice, sums: Sequence[Tensor]) -> None:
        """Add up the sums of one slice over all nodes; see `SliceReducer`."""
        total = sums[0].to(self._push.message.dtype, copy=True)
        for one in sums[1:]:
            total.add_(one)
        if part.start < self._gradients and not is_finite(total) and (self.encodes or all(map(all_finite, sums))):
            self._record_fault(0, part, total)  # no rank's alone, or overflowed in the encoding
        self.group.combined[part].copy_(total)  # one of `sums`

    def finalize(self, part: slice, total: Tensor) -> None:
        """Let the rule turn the sum of one slice into its result, by the sum of the tails; see `SliceReducer`."""
        if not self._sums or (self._active and self._passes(part)):
            return
        if self._watches and part.start < self._gradients and not is_finite(total):
            self._name_nonfinite(part, total)
        self._combiner.sum(part, total, total)

    def report_nonfinite(self, faults: Tensor) -> None:
        """Write the faults to the column BAD of the ranks' rows in this rank's tail; see `SliceReducer`."""
        for rank, slot in enumerate(faults.tolist()):
            if slot < math.inf:
                self._push.rows[rank, BAD] = 1 + slot

    def _name_nonfinite(self, part: slice, total: Tensor) -> None:
        """Note the ranks whose nodes have reported them for a sum that is not finite; without any, name the server."""
        named = [(rank, row[BAD]) for rank, row in enumerate(self._push.heard.table()) if row[BAD] and row[WEIGHT]]
        for rank, bad in named:
            self._faulty, self.faults[rank] = True, bad - 1
        if not named:
            self._record_fault(0, part, total)

    def _passes(self, part: slice) -> bool:
        """Return whether a part of the gradients is outside of this round's fragment."""
        assert self._active
        inside = both(part, self._active)
        return bool(part.start < self._gradients and inside.start >= inside.stop)

    def _record_fault(self, rank: int, part: slice, values: Tensor) -> None:
        """Note the first tensor in which a rank's values are not finite; none if only their squares overflow."""
        self._faulty = True
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            at = part.start + int(bad[0])
            slot = max(i for i, s in enumerate(self.replica.flat.slots) if s.offset <= at)
            self.faults[rank] = min(float(self.faults[rank]), slot)

    def decide(self, decision: Decision | None = None) -> None:
        """Carry out the decision; every rank steps its slices. See `Transport`."""
        if decision is None:
            self._follow()
        elif decision.action == "step":
            self._step(decision.scale, decision.times)
        elif decision.action == "adopt":
            self._tell(ADOPTED)
            self._adopt()
        else:
            self._tell(SKIPPED)

    def _step(self, scale: float, times: float) -> None:
        """Step this rank's slices and let the other ranks step theirs, at the server."""
        self._moved, present = True, self._push.heard.present()
        if not isinstance(self._optimizer, ShardedOptimizer):
            assert self._optimizer
            self._optimizer.step(present, self._clip, scale, times)
            return
        self._tell(STEPPED, scale, times)
        factor = times
        if self._clip is not None:
            measured = self.group.report(self._measure(present), "sum").tolist()
            norms = [(norm if self._alone else math.sqrt(norm)) * times for norm in measured]
            seen = [norm for norm, there in zip(norms, present, strict=False) if there]
            factor *= _factor(seen, self._clip, self._push.message)
            self._tell(STEPPED, scale, factor)
        self._optimizer.step(present, factor, scale)

    def _adopt(self) -> None:
        assert self._optimizer
        self._moved = True
        self._optimizer.adopt()

    def _tell(self, take: float, scale: float = 1.0, factor: float = 1.0) -> None:
        if isinstance(self._optimizer, ShardedOptimizer):
            decision = [take, factor, scale, *hyper.read(self._optimizer.torch)]
            self._decision[: len(decision)] = torch.tensor(decision, dtype=torch.float64)
            self.group.decide(self._decision)

    def _follow(self) -> None:
        """Carry out the server's decision on another rank."""
        if not isinstance(self._optimizer, ShardedOptimizer):
            return
        self.group.decide(self._decision)
        take = self._decision[TAKE]
        if take == ADOPTED:
            self._adopt()
        if take != STEPPED:
            return
        present = self._push.heard.present()
        if self._clip is not None:
            self.group.report(self._measure(present), "sum")
            self.group.decide(self._decision)
        decision = self._decision.tolist()
        factor, scale = decision[FACTOR], decision[SCALE]
        hyper.write(self._optimizer.torch, decision[self._numbers])
        self._optimizer.step(present, factor, scale)
        self._moved = True

    def _measure(self, present: Sequence[float]) -> Tensor:
        """Return the norms of the combined gradients that this rank measures, tensor by tensor, as `clip_grad_norm_` does.

        On one node a rank measures whole tensors. On several nodes it measures its parts of them, and returns the squared
        norms.
        """
        norms = torch.zeros_like(self.faults)
        for n, slot in enumerate(self.replica.flat.slots):
            for span in self.group.spans if present[n] else []:
                start, stop = max(span.start, slot.offset), min(span.stop, slot.offset + slot.numel)
                if not self._alone and start < stop:
                    norms[n] += float(torch.linalg.vector_norm(self.group.combined[start:stop], dtype=torch.float64)) ** 2
                elif self._alone and span.start <= slot.offset + slot.numel // 2 < span.stop:
                    norms[n] = _norm(slot.shaped(self.group.buffers.gathered(slot.span)))
        return norms

    def pull(self, control: Control | None = None, weights: Tensor | None = None) -> None:
        """Complete the pull message in place; between nodes it is sent. See `Transport`."""
        pull = self.replica.pull

        def fill() -> None:
            if control is not None:
                pull.control = control
            if weights is not None:
                pull.weights.copy_(weights)

        self.group.broadcast(fill, self._moved, weights is not None)
        self._moved = False

    def tell(self, control: Control | None = None) -> None:
        """Send the control as `pull` does; see `Transport`."""
        self.pull(control)

    def average(self) -> None:
        """Average by messages; see `Transport`."""
        average_by_messages(self._communicator, self.replica, self._rule, self._last, self._first)

    def optimizer_shard(self) -> dict[str, Any]:
        """Return the state of this rank's slices if the optimizer is sharded; see `Transport`."""
        return self._optimizer.own() if isinstance(self._optimizer, ShardedOptimizer) else {}

    def optimizer_state(self, others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Put the state together from all ranks' slices if the optimizer is sharded; see `Transport`."""
        assert self._optimizer
        if isinstance(self._optimizer, ShardedOptimizer):
            return self._optimizer.state_dict(others)
        return self._optimizer.state_dict()


def _how(group: NodeGroup) -> str:
    """Return how contributions are brought together, as a text for people."""
    memory = "memory of GPUs, by CUDA IPC" if group.spec.device.type == "cuda" else "shared memory"
    if len(group.nodes) == 1:
        return memory
    return f"{memory}, {str(group.spec.codec.wire).removeprefix('torch.')} between {len(group.nodes)} nodes"


def _norm(tensor: Tensor) -> Tensor:
    """Return a gradient's norm, by the kernel that `clip_grad_norm_` uses on its device."""
    return torch._foreach_norm([tensor])[0] if tensor.is_cuda else torch.linalg.vector_norm(tensor)


def _factor(norms: list[float], clip: float, like: Tensor) -> float:
    """Return the factor by which `clip_grad_norm_` multiplies the gradients, computed as there."""
    total = torch.linalg.vector_norm(torch.tensor(norms, dtype=like.dtype, device=like.device))
    return float(torch.clamp(clip / (total + 1e-6), max=1.0))
