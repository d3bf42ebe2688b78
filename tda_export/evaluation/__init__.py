"""Measure on text how close a method stays to the dense model."""
