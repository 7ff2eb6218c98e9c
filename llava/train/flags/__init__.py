"""Command line of training: the flags, and what is checked before data and weights are read."""
