"""FP8 weights of the LLM's linear layers, for inference and as the frozen base of LoRA."""
