"""Atomic checkpoints, exact resume, signals and the non-finite guard of training."""
