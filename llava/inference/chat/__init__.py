"""Conversations about images: KV cache across turns, batch-1 decoding, streamed answers."""
