"""`mpips plan`: what a round takes on machines that are not there, from the plan that a run would follow.

    job        nodes, ranks, model; the machine's figures; the room that a run would ask for
    schedule   who sends how many bytes to whom in which step
    memory     what lies in it, on a rank and on a node
    round      the seconds of each phase, and which of the machine's parts takes most of them
    table      how it is shown

Slices, steps and rooms come from `mpips.model.layout` and `mpips.comm`, which a run calls with the same numbers; only what each
takes is figured out here. No tensor of the model's size is made. `benchmarks/simgrid` replays the schedule on a simulated
network.
"""

from mpips.cli.cost.job import Job, Machine
from mpips.cli.cost.memory import Item, memory
from mpips.cli.cost.round import Phase, Round, predict
from mpips.cli.cost.schedule import Schedule, schedule
from mpips.cli.cost.table import facts, table

__all__ = ["Item", "Job", "Machine", "Phase", "Round", "Schedule", "facts", "memory", "predict", "schedule", "table"]
