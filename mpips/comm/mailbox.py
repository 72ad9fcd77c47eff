"""The messages under way in a simulated world."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Letter:
    """The bytes of a message, and the virtual time at which they arrive."""

    data: Tensor
    arrival: float


class Mailbox:
    """The messages between the server and the other ranks, of which a rank has at most one under way.

    Attributes:
        requests: rank -> its request, not yet received by the server.
        held: the ranks whose request the server has received and not answered.
        answers: rank -> its answer, not yet taken by the rank.
        between: (sender, receiver) -> the messages under way between two leaders of nodes.
    """

    def __init__(self) -> None:
        self.requests: dict[int, Letter] = {}
        self.held: set[int] = set()
        self.answers: dict[int, Letter] = {}
        self.between: dict[tuple[int, int], list[Letter]] = {}

    def take(self, choose: random.Random) -> tuple[int, Letter]:
        """Return the rank and the bytes of the request that arrives first; `choose` decides between simultaneous requests."""
        first = min(letter.arrival for letter in self.requests.values())
        rank = choose.choice(sorted(rank for rank, letter in self.requests.items() if letter.arrival == first))
        self.held.add(rank)
        return rank, self.requests.pop(rank)


def raw(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor's bytes."""
    return tensor.view(torch.uint8)
