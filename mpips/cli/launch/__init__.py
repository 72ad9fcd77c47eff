"""The launcher: starts the ranks with the MPI that belongs to this Python, watches them, and leaves no process behind.

command  the command to run: mpiexec, its environment, the printed line
foresee  errors in the settings, found before a rank is started
job      running the command: output, signals, time limits, exit status
retry    running it again after a death, from the last checkpoint
ranks    which rank's process ended first
watch    what the run reports: run folder, DONE, failures
keeper   ending every process of a run, even if the launcher is killed
"""

from mpips.cli.launch.command import LaunchCommand, launch_command
from mpips.cli.launch.foresee import foresee
from mpips.cli.launch.job import Outcome, run
from mpips.cli.launch.retry import run_again

__all__ = ["LaunchCommand", "Outcome", "foresee", "launch_command", "run", "run_again"]
