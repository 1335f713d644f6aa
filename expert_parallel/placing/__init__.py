"""Placements by load: which device should hold which expert."""
