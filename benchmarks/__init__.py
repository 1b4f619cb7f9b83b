"""Speed against PyTorch: `pytest benchmarks`, and `python -m benchmarks.report` for the table and its JSON."""
