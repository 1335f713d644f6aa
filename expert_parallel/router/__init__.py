"""Steering a router's load: by a bias on its choice, by limits of slots per expert. Both change what a model says."""
