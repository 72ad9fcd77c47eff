"""The server that answers requests: asynchronous, bounded-staleness and elastic training."""

from mpips.parameter_server.dealing import Dealing as Dealing
from mpips.parameter_server.kept import Kept as Kept
from mpips.parameter_server.server import ParameterServer as ParameterServer
