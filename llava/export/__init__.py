"""Programs that write checkpoints: merge an adapter, change the layout, quantise."""
