"""`mpips bench`: mpips and its opponents measured alternately in one run; all must end with the same weights.

    flags       the command line
    session     starts the ranks, or runs as one; shows the results
    clock       alternation, barriers, seconds: the maximum over the ranks
    case        the figures of one measurement: median, min, max, ratios
    facts       cores, ranks, hosts, versions
    agreement   whether all variants have the same weights
    gradient    the gradients that are pushed
    own         mpips: a run as a script makes it
    opponents   what mpips is compared with: files outside of this package; in the source tree, benchmarks/opponents
    limit       the lower bound: every rank copies the model once; between hosts, the line rate
    round, train, checkpoint     the measurements; `small` is `round` in batches, `scaling` is `round` on 2, 4, 8 ranks
    table, picture               the output

Only ratios of a measurement are meaningful: compare what was measured alternately in one run.
"""
