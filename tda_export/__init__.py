"""Threshold-based dynamic activation (TDA) for ONNX Runtime: calibrate, build, verify, generate."""

__version__ = "0.1.0"
