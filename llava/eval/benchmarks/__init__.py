"""The benchmarks of LLaVA-1.5: scorers, converters to submission files, and the table of what each needs.

Every scorer is a pure function from lines (`lines.py`) to a `BenchmarkResult` (`result.py`).
"""
