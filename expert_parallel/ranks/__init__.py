"""Real ranks: starting together, agreeing, failing together."""
