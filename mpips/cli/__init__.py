"""The command `mpips`: its verbs, the launcher, the screen, benchmarks, predictions."""
