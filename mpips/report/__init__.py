"""The files and lines that a run leaves for its user."""
