"""Models without weights: configurations, architecture, checkpoint check, forward pass."""
