"""Checkpoints: find and open one, read only the experts that a device holds."""
