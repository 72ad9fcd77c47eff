"""A rank's part of a round in memory that ranks share: it combines and steps the slices that it serves.

    everyone   combine                                  its slices of all push messages become one, in the first of its node
    server     faults, then step or skip                judges, tells the others, steps its own slices
    others     follow                                   do as they are told

Where the server's rank serves all slices, `follow` is empty and nothing is told.
"""

from mpips.reduce.sharded_step.setup import settle
from mpips.reduce.sharded_step.step import SETTINGS, ShardedStep

__all__ = ["SETTINGS", "ShardedStep", "settle"]
