"""Experts on disk: which stay in memory, reading the others, and what that costs."""
