"""Experts on disk: which stay in memory, reading the others, and what that costs."""

POLICIES = ("lru", "lfu", "aging", "pinned")  # who makes room, see policies.py
PREFETCH = ("none", "next-layer", "learned")  # what is read ahead, see prefetch.py
