"""The server that answers requests: asynchronous, bounded-staleness and elastic training."""

from mpips.server.parameter_server.batch_queue import BatchQueue as BatchQueue
from mpips.server.parameter_server.server import ParameterServer as ParameterServer
from mpips.server.parameter_server.update_buffer import UpdateBuffer as UpdateBuffer
