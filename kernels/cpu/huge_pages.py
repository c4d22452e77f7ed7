"""Large pages for large results.

A large block that an allocator has just had from the system is not there yet: the first write to each page of 4 KiB
waits until the system has found one and cleared it. For the output of a large layer that takes as long as to compute
it. Linux gives 2 MiB at a time (on x86) where a program asks for it, which NumPy does for its arrays; TensorFlow and
PyTorch do not.
"""

from __future__ import annotations

import ctypes
import mmap

import llvmlite.binding as llvm
from numba.core import types

from .jit import entry
from .memory import ceil_div

LEAST_BYTES = 4 << 20  # NumPy's bound too: smaller blocks mostly come from what the allocator has kept
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", 0)  # Linux alone
_PAGE = mmap.PAGESIZE

# Where there is no such call nothing calls it, but the compiled code names it all the same.
_function = ctypes.CDLL(None).madvise if _ADVICE != 0 else ctypes.CFUNCTYPE(None)(lambda: None)
llvm.add_symbol("fastsepconv_madvise", ctypes.cast(_function, ctypes.c_void_p).value)
_madvise = types.ExternalFunction("fastsepconv_madvise", types.int32(types.intp, types.intp, types.int32))


@entry
def ask_for_huge_pages(address, size):
    """Asks for large pages under the `size` bytes at `address`. It is advice: nothing fails where there are none."""
    if _ADVICE == 0 or size < LEAST_BYTES:
        return
    first, last = ceil_div(address, _PAGE) * _PAGE, (address + size) // _PAGE * _PAGE
    _madvise(first, last - first, _ADVICE)
