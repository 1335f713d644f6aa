"""Steering the load of experts, with its price in quality."""
