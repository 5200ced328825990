"""Benchmarks: `pytest benchmarks/ --benchmark-only`, then `python -m benchmarks.report`."""
