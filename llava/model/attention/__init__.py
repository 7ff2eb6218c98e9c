"""Attention backends and rotary position embeddings."""
