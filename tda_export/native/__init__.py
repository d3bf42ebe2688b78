"""The native kernels: a small C++ library for ONNX Runtime, with device code that is compiled for the user's GPU at run
time."""
