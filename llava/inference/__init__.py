"""Inference: prompts, sampler and detokenizer; chat, batch inference and its engine."""
