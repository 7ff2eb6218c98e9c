"""Llama's sentencepiece tokenizer and its files."""
