"""Experts that move between devices while a model runs, when that repays its pause."""
