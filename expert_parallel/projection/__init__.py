"""Time per token on hardware that is not here; the constants of this machine."""
