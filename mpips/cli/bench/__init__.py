"""`mpips bench`: mpips and its opponents in one run, taking turns; each must end with the same weights.

    flags       what may be said on the command line
    session     starts the ranks, or is one; shows what was measured
    clock       turns, barriers, seconds: the maximum over the ranks
    case        one measurement's figures: median, min, max, ratios
    facts       cores, ranks, hosts, versions
    agreement   whether all variants have the same weights
    gradient    what is pushed
    own         mpips: a run as a script makes it
    raw_mpi     mpi4py's Reduce, the same step, Bcast
    gloo        torch.distributed's all-reduce, the same step everywhere
    limit       every rank copies the model once; between hosts the line rate
    round, train, checkpoint     the measurements; `small` is `round` in batches, `scaling` is `round` on 2, 4, 8 ranks
    table, picture               how they are shown

A measurement is only worth its ratio: compare what was interleaved in one run.
"""
