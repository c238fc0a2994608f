"""Benchmarks: one command each, `python -m benchmarks.NAME --json out.json`. See README.md."""
