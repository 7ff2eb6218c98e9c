"""Continuous-batching engine with shared image prefixes."""
