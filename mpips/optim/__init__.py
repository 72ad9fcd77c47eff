"""Optimizers on the flat weights: the script's own, the server's, several joined into one; their state by parameter name."""
