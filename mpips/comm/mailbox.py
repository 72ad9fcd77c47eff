"""The messages that are on their way in a simulated world."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Letter:
    """Bytes under way, and the virtual time at which they arrive."""

    data: Tensor
    arrival: float


class Mailbox:
    """Letters to the server and back; one rank has at most one.

    Attributes:
        requests: rank -> what it has asked and the server not yet received.
        held: ranks whose request the server has received and not answered.
        answers: rank -> the answer that it has not yet taken.
        between: sender and receiver -> what is under way between them, where these are leaders of nodes.
    """

    def __init__(self) -> None:
        self.requests: dict[int, Letter] = {}
        self.held: set[int] = set()
        self.answers: dict[int, Letter] = {}
        self.between: dict[tuple[int, int], list[Letter]] = {}

    def take(self, choose: random.Random) -> tuple[int, Letter]:
        """The request that arrives first, and whose; `choose` decides among several at the same time."""
        first = min(letter.arrival for letter in self.requests.values())
        rank = choose.choice(sorted(rank for rank, letter in self.requests.items() if letter.arrival == first))
        self.held.add(rank)
        return rank, self.requests.pop(rank)


def raw(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes."""
    return tensor.view(torch.uint8)
