"""The native kernels: a small C++ library for ONNX Runtime, with device code that is compiled on the user's GPU."""
