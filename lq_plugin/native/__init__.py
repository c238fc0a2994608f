"""Kernels compiled on first use: the same numbers as the torch operations they stand for, in fewer passes over memory.

They are used where they can be had: in C++ on the CPU (a compiler; the first use takes some seconds), in Triton on GPUs
(it comes with torch's CUDA builds). Tensors of float32, float16 and bfloat16 are read and written at their own width,
ranges and scales are float32, and so is the arithmetic: a result is rounded once, so that 16 bits hold the levels of
the float32 path, rounded. In training under autocast layers whose operands it would cast get them in its dtype at once.
All else takes the torch operations.

`LQ_NATIVE=0` in the environment switches them off, `LQ_NATIVE=1` makes it an error if they are missing, `use_native`
does the same for a part of a program.
"""

from lq_plugin.native.build import NativeError as NativeError
from lq_plugin.native.switch import available as available, use_native as use_native
