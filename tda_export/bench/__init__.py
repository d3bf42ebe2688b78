"""Measurements: models of true shape with random weights, and timing harnesses."""
