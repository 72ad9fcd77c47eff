"""A worker: of rounds, or of a server that answers requests."""
