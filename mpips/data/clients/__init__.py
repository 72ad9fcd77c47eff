"""Federated clients: many clients with data of their own, which of them train in a round, and on which worker.

All choices follow from the given numbers only, so they are the same on every rank. No random stream of the process is read or
moved.
"""

from mpips.data.clients.clients import Clients
from mpips.data.clients.hosting import Hosting
from mpips.data.clients.round import chosen, hosts

__all__ = ["Clients", "Hosting", "chosen", "hosts"]
