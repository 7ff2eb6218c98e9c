"""Examination of training data; `python -m llava.data.doctor` runs it."""
