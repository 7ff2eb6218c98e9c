"""Finetuning and pretraining."""
