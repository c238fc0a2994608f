"""A model as a `torch.export` program with quantize and dequantize operations, for runtimes that compute with integers.

Both ExecuTorch and LiteRT read such a program and run an operation as integers where all that it reads is dequantized
and its result is quantized. `build.integer_program` makes it: traced from the quantized model itself (`trace`), batch
norms folded (`batch_norm`), and a grid given to every tensor that an integer operation reads or writes (`settle`).
"""
