"""Benchmarks, one script for each figure; run them as `python -m benchmarks.NAME`."""
