"""Threshold-based dynamic activation (TDA) for ONNX Runtime: calibrate, build, verify, generate."""

import os

__version__ = "0.1.0"

# ONNX Runtime's wheels report to Microsoft and keep a device id in the user's home unless this is set before it loads.
# A value that the user has set already is kept.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
