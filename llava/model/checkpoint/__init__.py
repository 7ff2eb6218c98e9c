"""Checkpoint directories: layouts, reading, strict loading, conversion and writing."""
