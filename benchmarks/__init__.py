"""Benchmarks: one file a question, each with its peers in the same run."""
