"""Checkpoints: where a model comes from, what its architecture is, and its weights, one tensor at a time."""
