"""Quantise models to integers: GPTQ, rounding to nearest, and the folder that holds the result."""
