"""Batch inference over a question file: questions in, journaled answers out, interrupted runs resumed."""
