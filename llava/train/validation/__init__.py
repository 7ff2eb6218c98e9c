"""Validation during training: loss and accuracy on held-out records."""
