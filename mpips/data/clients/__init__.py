"""Clients: many of them, each with data of its own; which of them train in a round, and on which worker.

Everything here follows from the numbers given, the same on every rank; no stream of the process is read or moved.
"""

from mpips.data.clients.clients import Clients
from mpips.data.clients.hosting import Hosting
from mpips.data.clients.round import chosen, hosts

__all__ = ["Clients", "Hosting", "chosen", "hosts"]
