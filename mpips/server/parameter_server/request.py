"""What a request says in its row besides what every row says."""

# `want` is a sum of these
WEIGHTS = 1  # the answer is to bring the weights, if they are others than the worker has
BATCH = 2  # and the number of a batch
BUSY = 4  # the worker is in the middle of something: it cannot end or give its state before its next push

BYE = 3  # as `stop`: the worker has closed and asks no more
