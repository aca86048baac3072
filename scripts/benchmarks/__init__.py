"""Parts of scripts/benchmark.py: one module per group of sections."""
