"""Keeps the writer of fixtures, which needs torch, out of the collection of doctests."""

collect_ignore = ["references.py"]
