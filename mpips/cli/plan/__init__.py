"""`mpips plan`: what a round costs on machines that are not present, computed by the code that lays out a run.

    job        nodes, ranks, model; the machine's figures; the buffers that a run would allocate
    schedule   which node sends how many bytes to which other node in which step
    memory     what occupies memory, for each rank and each node
    round      the seconds of each phase, and the bottleneck
    table      the output

Slices, steps and buffer sizes come from `mpips.model.layout` and `mpips.comm`, which a run calls with the same numbers; only
times are computed here. No tensor of the model's size is allocated. `benchmarks/simgrid` replays the schedule on a simulated
network.
"""

from mpips.cli.plan.job import Job, Machine
from mpips.cli.plan.memory import Item, memory
from mpips.cli.plan.round import Phase, Round, predict
from mpips.cli.plan.schedule import Schedule, schedule
from mpips.cli.plan.table import facts, table

__all__ = ["Item", "Job", "Machine", "Phase", "Round", "Schedule", "facts", "memory", "predict", "schedule", "table"]
