"""Tables of what was measured, simulated and modelled."""
