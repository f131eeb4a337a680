"""Implementations under test: the reference, the three adapters, and other people's."""
