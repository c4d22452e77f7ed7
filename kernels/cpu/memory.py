"""Addresses, copies and shares of work, for kernels that are handed raw addresses."""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import kernel


@intrinsic
def _as_pointer(typing_context, dtype, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.instance_type)(dtype, types.intp), codegen


@intrinsic
def size_of(typing_context, dtype):
    """Bytes of an element of `dtype`, a constant."""

    def codegen(context, builder, signature, arguments):
        return context.get_constant(types.intp, dtype.instance_type.bitwidth // 8)

    return types.intp(dtype), codegen


@kernel
def view(dtype, address, length):
    """The `length` elements at `address` as an array. It does not own them."""
    return carray(_as_pointer(dtype, address), (length,))


@kernel
def address(array):
    """The address of `array`'s first element, as a signed integer like all addresses here."""
    return np.intp(array.ctypes.data)


@intrinsic
def keep(typing_context, array):
    """Keeps `array` alive up to here: Numba frees an array after its last mention, whoever still has its address."""

    def codegen(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def copy(typing_context, target, source, size):
    """Copies `size` bytes from address to address."""

    def codegen(context, builder, signature, arguments):
        target, source, size = arguments
        target, source = (builder.inttoptr(a, cgutils.voidptr_t) for a in (target, source))
        cgutils.raw_memcpy(builder, target, source, size, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def fence(typing_context):
    """Makes what this thread wrote past the caches visible to all before anything it writes later."""

    def codegen(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@kernel
def share(total, worker, workers):
    """The part [first, last) of `total` pieces of work that falls to `worker`: contiguous, sizes one apart at most."""
    return total * worker // workers, total * (worker + 1) // workers


@kernel
def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)
