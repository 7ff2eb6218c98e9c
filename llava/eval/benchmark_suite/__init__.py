"""Run of several benchmarks: files that it reads, scores, tables."""
