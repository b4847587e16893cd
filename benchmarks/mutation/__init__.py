"""What `python -m benchmarks mutants` is made of: alterations, the processes that try them, tables."""
