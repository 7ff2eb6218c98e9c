"""Programs for talking to the model."""
