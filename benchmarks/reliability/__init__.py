"""Evidence that takes too long for a test: `python -m benchmarks.reliability.NAME`; figures in docs/reliability.md."""
