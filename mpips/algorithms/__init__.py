"""The table of modes, and what a worker computes between pull and push in each."""
