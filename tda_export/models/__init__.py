"""Checkpoints: a model's source, its architecture, and its weights, one tensor at a time."""
