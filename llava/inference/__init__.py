"""Prompt in, answer out: one at a time, in dialogue, in batches."""
