"""Starts the ranks with the MPI that belongs to this Python, watches them, and leaves nothing behind.

command  what to run: mpiexec, its environment, the printed line
foresee  what is wrong with its settings, before a rank is started
job      running it: output, signals, time limits, exit status
ranks    which of their processes ended first
watch    what the run says about itself: run folder, DONE, failures
keeper   ending every process of a run, also when the launcher is killed
"""

from mpips.cli.launch.command import Plan, plan
from mpips.cli.launch.foresee import foresee
from mpips.cli.launch.job import Outcome, run

__all__ = ["Outcome", "Plan", "foresee", "plan", "run"]
