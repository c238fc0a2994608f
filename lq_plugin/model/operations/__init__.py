"""Quantized operands of operations that no layer owns: `x + y`, `q @ k.T`, attention."""
