"""Publish a checkpoint on the Hugging Face hub: its model card, which files go there, one commit."""
