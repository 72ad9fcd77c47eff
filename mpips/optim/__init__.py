"""Optimizers on the flat buffer: the script's own, the server's, several as one; their state by parameter name."""
