"""Kernels in C++, compiled on first use: the same numbers as the torch operations they stand for, in fewer passes over memory.

They are used where they can be had (a C++ compiler; the first use takes some seconds), for float32 on the CPU; everything
else takes the torch operations. `LQ_NATIVE=0` in the environment switches them off, `LQ_NATIVE=1` makes it an error if they are
missing, `use_native` does the same for a part of a program.
"""

from lq_plugin.native.build import NativeError
from lq_plugin.native.switch import available, use_native

__all__ = ["NativeError", "available", "use_native"]
