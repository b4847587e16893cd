"""What `python -m benchmarks mutants` is made of: alterations, processes and tables."""
