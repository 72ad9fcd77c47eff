"""The process: the launcher's variables, signals, standard streams, random state."""

__version__ = "0.1.0"
