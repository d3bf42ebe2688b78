"""Weights from checkpoint to kernel: formats, matrices, and which linears an artifact stores."""
