"""Kernels that run on a thread pool: `parallel_kernel` makes one of a function that does one worker's share.

    @parallel_kernel
    def _fill(dtype, worker, workers, length, y): ...       # one worker's share

    _fill(dtype, threads, length, y)                        # in a compiled caller: all shares, on the pool

Why not `prange`: each share is compiled once for a dtype and called by address, so that no caller, and no caller's
caller, compiles its vector code again; two loops in a row are never fused into one; and nothing is taken for dead
because an address hides who reads it. The pool is the package's own or one of Numba's, called as Numba's generated
code calls it.

`compiled_once` does the same for what several shares call: Numba would compile a tile's code for each of them anew.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import traceback
from collections.abc import Callable, Container
from types import ModuleType

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import typeof
from numba.core import cgutils, types
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic
from numba.extending import intrinsic

from ..geometry import Geometry
from . import threads
from .atomics import WORD, external_word, keep_for_good
from .jit import Callback
from .simd import BFLOAT16, arithmetic_type

_BYTES = ir.IntType(8).as_pointer()
_GEOMETRY = typeof(Geometry(*[0] * len(Geometry._fields)))
BOUNDS = ("x_low", "low", "high")
_DTYPES = {types.float32: np.float32, types.float64: np.float64, types.uint16: BFLOAT16}
# By name: the cell, what fills it, the function, the dtype.
_functions: dict[bytes, tuple[ctypes.Array, Callback, Callable, types.Float]] = {}
_called_by_address: dict[_Intrinsic, Callable] = {}
_never_called_with: dict[Callable, Container[types.Type]] = {}


def parallel_kernel(function: Callable) -> Callable:
    """Compile `function(dtype, worker, workers, ...)`, a share of the work, to be called as `(dtype, shares, ...)`.

    Parameters named `g` are a Geometry, those of BOUNDS numbers that the dtype is computed in, all others integers.
    The shares must not depend on each other: they may run one after another, on one thread. There may be more of them
    than threads: a thread that is done takes another.
    """
    names = _parameters(function, 3)
    for scalar in _DTYPES:
        _register(function, scalar, (types.intp, types.intp, *_parameter_types(names, scalar)))

    @intrinsic
    def run(typing_context, dtype, threads, *arguments):
        scalar = dtype.instance_type
        parameters = _parameter_types(names, scalar)

        def codegen(context, builder, signature, values):
            dtype_value, workers, arguments = values
            values = [dtype_value, workers, *cgutils.unpack_tuple(builder, arguments, len(parameters))]
            _emit_run(context, builder, _name(function, scalar), [dtype, types.intp, types.intp, *parameters], values)
            return context.get_dummy_value()

        return types.void(dtype, types.intp, types.Tuple(parameters)), codegen

    return run


def compiled_once(function: Callable | None = None, *, but_for: Container[types.Type] = ()) -> Callable:
    """Compile `function(dtype, ...)`, which returns nothing and is called by shares, once for a dtype.

    Parameters are as in `parallel_kernel`. A share that names it, or calls a kernel that does, finds it compiled: but
    for dtypes with which it is never called, which saves their first call a second.
    """
    if function is None:
        return functools.partial(compiled_once, but_for=but_for)
    _never_called_with[function] = but_for
    names = _parameters(function, 1)
    for scalar in _DTYPES:
        _register(function, scalar, _parameter_types(names, scalar))

    @intrinsic
    def call(typing_context, dtype, *arguments):
        scalar = dtype.instance_type
        parameters = _parameter_types(names, scalar)

        def codegen(context, builder, signature, values):
            dtype_value, arguments = values
            values = [dtype_value, *cgutils.unpack_tuple(builder, arguments, len(parameters))]
            callee = _emit_address(context, builder, _name(function, scalar))
            callee_type = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            builder.call(builder.inttoptr(callee, callee_type.as_pointer()), values)
            return context.get_dummy_value()

        return types.void(dtype, types.Tuple(parameters)), codegen

    _called_by_address[call] = function
    return call


def _parameters(function: Callable, first: int) -> list[str]:
    return list(inspect.signature(function).parameters)[first:]


def _name(function: Callable, scalar: types.Float) -> str:
    return f"fastsepconv:{function.__module__}.{function.__qualname__}:{scalar}"


def _parameter_types(names: list[str], scalar: types.Float) -> tuple[types.Type, ...]:
    bound = arithmetic_type(types.NumberClass(scalar))
    return tuple(_GEOMETRY if name == "g" else bound if name in BOUNDS else types.intp for name in names)


def _register(function: Callable, scalar: types.Float, parameters: tuple[types.Type, ...]) -> None:
    """Give a function a cell for its address, 0 until it is compiled. Compiled callers know the cell by name."""
    name = _name(function, scalar)
    cell = (ctypes.c_int64 * 1)(0)
    keep_for_good(cell)
    signature = (types.NumberClass(scalar), *parameters), types.void
    callback = Callback(function, signature, locals={}, options={"error_model": "numpy"})
    _functions[name.encode()] = cell, callback, function, scalar
    llvm.add_symbol(name, ctypes.addressof(cell))


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _compile_share(name: bytes) -> None:
    """Compile the share of that name and fill its cell, or leave it 0 where that fails or is interrupted.

    A process does so before it first runs the share, and sees to it that there is a pool.
    """
    try:
        threads.ensure_started()
        _compile(name)
    except Exception:  # the caller is compiled code, through which no Python exception passes: it raises its own
        traceback.print_exc()


def _compile(name: bytes) -> None:
    """Compile a function, after all that it calls by address: within a share it is too late to say that this failed."""
    cell, callback, function, scalar = _functions[name]
    if cell[0] == 0:
        for called in _calls_by_address(function):
            if scalar not in _never_called_with[called]:
                _compile(_name(called, scalar).encode())
        cell[0] = callback.address


def _calls_by_address(function: Callable) -> set[Callable]:
    """The functions made by `compiled_once` that a function names, by itself or in a module, or a kernel it names."""
    found, names = set(), function.__code__.co_names
    modules = [value for value in map(function.__globals__.get, names) if isinstance(value, ModuleType)]
    places = [function.__globals__, *map(vars, modules)]
    for value in (place.get(name) for place in places for name in names):
        if isinstance(value, Dispatcher):
            found |= _calls_by_address(value.py_func)
        elif isinstance(value, _Intrinsic) and value in _called_by_address:
            found.add(_called_by_address[value])
    return found


llvm.add_symbol("fastsepconv_compile_share", ctypes.cast(_compile_share, ctypes.c_void_p).value)


def _emit_run(context, builder, name: str, argument_types: list[types.Type], values) -> None:
    """Calls the share `name` once for each worker: on the pool where it may be used, else one after another."""
    dtype, workers, *rest = values
    share = _emit_address(context, builder, name)
    fields = [share, workers, dtype, *rest]
    packed_type = ir.LiteralStructType([field.type for field in fields])
    packed = cgutils.alloca_once(builder, packed_type)
    for i, field in enumerate(fields):
        builder.store(field, cgutils.gep_inbounds(builder, packed, 0, i))
    entry = _emit_entry(context, builder.module, name, argument_types, packed_type)

    # the pool's protocol is that of NumPy's generalised ufuncs: argument i of worker w stands at args[i] + w*steps[i]
    arguments = _emit_array(builder, _BYTES, [ir.Constant(_BYTES, None), builder.bitcast(packed, _BYTES)])
    counts = _emit_array(builder, WORD, [workers])
    steps = _emit_array(builder, WORD, [WORD(1), WORD(0)])
    protocol = [builder.bitcast(pointer, _BYTES) for pointer in (arguments, counts, steps)]
    no_data = ir.Constant(_BYTES, None)
    mode = _emit_enter_pool(builder, workers)
    with builder.if_else(builder.icmp_signed("!=", mode, WORD(threads.SERIAL))) as (then, otherwise):
        with then:
            run_type = ir.FunctionType(ir.VoidType(), [_BYTES] * 5 + [WORD] * 3)
            run = builder.load_atomic(_pool_cell(builder, threads.RUN), "acquire", 8)
            run = builder.inttoptr(run, run_type.as_pointer())
            most = builder.load_atomic(_pool_cell(builder, threads.COUNT), "monotonic", 8)
            fewer = builder.select(builder.icmp_signed("<", workers, most), workers, most)
            builder.call(run, [builder.bitcast(entry, _BYTES), *protocol, no_data, WORD(0), WORD(2), fewer])
            with builder.if_then(builder.icmp_signed("==", mode, WORD(threads.EXCLUSIVE))):
                builder.store_atomic(WORD(0), _pool_cell(builder, threads.BUSY), "release", 8)
        with otherwise:
            builder.call(entry, [*protocol, no_data])


def _emit_enter_pool(builder, workers):
    """How this call may use the pool: one worker never, others as its mode says, an exclusive one only if free."""
    wanted = builder.load_atomic(_pool_cell(builder, threads.MODE), "acquire", 8)
    wanted = builder.select(builder.icmp_signed(">", workers, WORD(1)), wanted, WORD(threads.SERIAL))
    mode = cgutils.alloca_once_value(builder, wanted)
    with builder.if_then(builder.icmp_signed("==", wanted, WORD(threads.EXCLUSIVE))):
        busy = _pool_cell(builder, threads.BUSY)
        found = builder.extract_value(builder.cmpxchg(busy, WORD(0), WORD(1), "acq_rel", "acquire"), 1)
        builder.store(builder.select(found, wanted, WORD(threads.SERIAL)), mode)
    return builder.load(mode)


def _pool_cell(builder, number: int):
    return builder.gep(external_word(builder, threads.CELLS_SYMBOL), [WORD(number)])


def _emit_address(context, builder, name: str):
    """The share's address, from its cell; at the very first call the share is compiled."""
    address = cgutils.alloca_once(builder, WORD)
    builder.store(builder.load_atomic(external_word(builder, name), "acquire", 8), address)
    with builder.if_then(builder.icmp_signed("==", builder.load(address), WORD(0)), likely=False):
        compile_share = _external(builder, "fastsepconv_compile_share", ir.VoidType(), [_BYTES])
        text = context.insert_const_string(builder.module, name)
        builder.call(compile_share, [builder.bitcast(text, _BYTES)])
        builder.store(builder.load_atomic(external_word(builder, name), "acquire", 8), address)
        with builder.if_then(builder.icmp_signed("==", builder.load(address), WORD(0)), likely=False):
            context.call_conv.return_user_exc(builder, RuntimeError, (f"{name} could not be compiled",))
    return builder.load(address)


def _emit_entry(context, module, name: str, argument_types: list[types.Type], packed_type):
    """The function that the pool's threads call: workers first .. first + count, each with the packed arguments."""
    arguments = [_BYTES] * 4  # args, dimensions, steps, data
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), module.get_unique_name(f"{name}:entry"))
    entry.linkage = "internal"
    builder = ir.IRBuilder(entry.append_basic_block())
    args = builder.bitcast(entry.args[0], _BYTES.as_pointer())
    first = builder.ptrtoint(builder.load(args), WORD)
    packed = builder.bitcast(builder.load(builder.gep(args, [WORD(1)])), packed_type.as_pointer())
    count = builder.load(builder.bitcast(entry.args[1], WORD.as_pointer()))
    share, workers, dtype, *rest = (
        builder.load(cgutils.gep_inbounds(builder, packed, 0, i)) for i in range(len(packed_type.elements))
    )
    values = [context.get_value_type(argument) for argument in argument_types]
    share = builder.inttoptr(share, ir.FunctionType(ir.VoidType(), values).as_pointer())
    with cgutils.for_range(builder, count) as loop:
        builder.call(share, [dtype, builder.add(first, loop.index), workers, *rest])
    builder.ret_void()
    return entry


def _emit_array(builder, element, values):
    array = cgutils.alloca_once(builder, element, size=WORD(len(values)))
    for i, value in enumerate(values):
        builder.store(value, builder.gep(array, [WORD(i)]))
    return array


def _external(builder, name: str, result, arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
