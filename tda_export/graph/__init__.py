"""The ONNX graphs: their contract, how they are built, written and verified.

Importing this package loads nothing: the runtime takes `tda_export.graph.contract` from it without PyTorch or onnx.
"""
