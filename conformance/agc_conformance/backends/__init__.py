"""Implementations under test: the reference, the three adapters, and third-party code."""
