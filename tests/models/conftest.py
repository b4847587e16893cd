"""Keeps the writers of fixtures, which need torch, out of the collection of doctests."""

collect_ignore = ["references.py", "text_references.py"]
