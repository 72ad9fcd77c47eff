"""The table of modes, and for each mode what a worker computes between pull and push."""
