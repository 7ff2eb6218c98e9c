"""From tables and records to batches; runs without a model."""
