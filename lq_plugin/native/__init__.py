"""Kernels compiled on first use: the same numbers as the torch operations they stand for, in fewer passes over memory.

They are used where they can be had: in C++ for float32 on the CPU (a compiler; the first use takes some seconds), in
Triton for float32, float16 and bfloat16 on GPUs (it comes with torch's CUDA builds). Everything else takes the torch
operations. `LQ_NATIVE=0` in the environment switches them off, `LQ_NATIVE=1` makes it an error if they are missing,
`use_native` does the same for a part of a program.
"""

from lq_plugin.native.build import NativeError as NativeError
from lq_plugin.native.switch import available as available, use_native as use_native
