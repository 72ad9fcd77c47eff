"""The values of a request's columns `want` and `stop`."""

# `want` is the sum of some of these
WEIGHTS = 1  # the worker wants the weights if it has another version
BATCH = 2  # the worker wants the number of a batch
BUSY = 4  # the worker has used batches that it has not pushed: it cannot end or give its state before its next push

BYE = 3  # a value of `stop`: the worker closes and sends no more requests
