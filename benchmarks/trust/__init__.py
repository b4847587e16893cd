"""Campaigns of harm: calls, files and faults that must not go unnoticed, and must not cost more."""
