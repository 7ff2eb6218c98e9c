"""LoRA adapter directories: names, settings, reading, merging and attaching them."""
