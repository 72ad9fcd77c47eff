"""This process: its launcher's variables, signals, streams, random state."""

__version__ = "0.1.0"
