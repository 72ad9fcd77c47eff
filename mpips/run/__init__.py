"""A run as the script sees it: `connect`, the wrapped optimizer, loops over data, frameworks, failures, the run folder."""
