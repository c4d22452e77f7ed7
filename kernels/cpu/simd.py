"""Explicit vector code for Numba: a small emitter of LLVM vector instructions.

Numba leaves vectorisation to LLVM, which may settle for narrower registers than the CPU has. The micro-kernels
say instead which registers they want: they are written with `Vectors`, inside `@intrinsic` functions.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .tiles import CHOSEN

CACHE_LINE = 64
L1_PERIOD = 4096  # bytes: addresses so far apart share one set of L1, whose sets are counted within a page

INDEX = ir.IntType(64)
_LANE = ir.IntType(32)
_ANY_VECTOR_REGISTER = {"x86_64": "v", "aarch64": "w", "arm64": "w"}  # as constraints of inline assembly name it


def index(value: int) -> ir.Constant:
    """A 64-bit integer constant."""
    return ir.Constant(INDEX, value)


class Vectors:
    """Emits instructions on vectors of one floating-point type at an IRBuilder's position.

    Addresses are integers (as Numba passes them); offsets count elements. `fused` says whether the target has a
    fused multiply-add: where it has not, `llvm.fma` would be a call into the C library, a hundred times slower.
    """

    def __init__(self, builder: ir.IRBuilder, dtype: types.NumberClass, vector_bytes: int, fused: bool):
        self.builder = builder
        self.element = ir.DoubleType() if dtype.instance_type == types.float64 else ir.FloatType()
        self.itemsize = dtype.instance_type.bitwidth // 8
        self.lanes = vector_bytes // self.itemsize
        self.type = ir.VectorType(self.element, self.lanes)
        self._suffix = f"v{self.lanes}f{8 * self.itemsize}"
        self._fused = fused

    def pointer(self, address):
        """The element pointer at an integer address."""
        return self.builder.inttoptr(address, self.element.as_pointer())

    def at(self, pointer, offset):
        """The pointer `offset` elements on."""
        return self.builder.gep(pointer, [offset])

    def zero(self):
        return ir.Constant(self.type, [0.0] * self.lanes)

    def register(self, name: str):
        """A stack slot for one vector, which LLVM turns into a register."""
        return cgutils.alloca_once(self.builder, self.type, name=name)

    def splat(self, scalar):
        """A vector with `scalar` in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        single = self.builder.insert_element(undefined, scalar, ir.Constant(_LANE, 0))
        return self.builder.shuffle_vector(
            single, undefined, ir.Constant(ir.VectorType(_LANE, self.lanes), [0] * self.lanes)
        )

    def broadcast(self, pointer):
        """One element, loaded into every lane."""
        return self.splat(self.builder.load(pointer, align=self.itemsize))

    def mask(self, count, first: int = 0):
        """A lane mask: lane i is on where `first + i < count`."""
        lane_numbers = ir.Constant(ir.VectorType(INDEX, self.lanes), [first + i for i in range(self.lanes)])
        return self.builder.icmp_signed("<", lane_numbers, self.splat(count))

    def load(self, pointer, mask=None):
        """One vector; lanes that are off read nothing and hold zero."""
        vector = self.builder.bitcast(pointer, self.type.as_pointer())
        if mask is None:
            return self.builder.load(vector, align=self.itemsize)
        function = self._declare("llvm.masked.load", self.type, [vector.type, _LANE, mask.type, self.type], ".p0")
        return self.builder.call(function, [vector, ir.Constant(_LANE, self.itemsize), mask, self.zero()])

    def load_span(self, pointer, masks: list) -> list:
        """Vectors that lie side by side, one for each mask (None loads it whole)."""
        return [self.load(self.at(pointer, index(j * self.lanes)), mask) for j, mask in enumerate(masks)]

    def store(self, value, pointer, mask=None):
        """One vector; lanes that are off write nothing."""
        vector = self.builder.bitcast(pointer, self.type.as_pointer())
        if mask is None:
            self.builder.store(value, vector, align=self.itemsize)
            return
        function = self._declare("llvm.masked.store", ir.VoidType(), [self.type, vector.type, _LANE, mask.type], ".p0")
        self.builder.call(function, [value, vector, ir.Constant(_LANE, self.itemsize), mask])

    def stream(self, value, pointer):
        """One vector, written past the caches. Assumes: the pointer is a multiple of the vector's size."""
        vector = self.builder.bitcast(pointer, self.type.as_pointer())
        instruction = self.builder.store(value, vector, align=self.lanes * self.itemsize)
        instruction.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(_LANE, 1)]))

    def prefetch(self, pointer, level: int = 2, write: bool = False):
        """Ask for the cache line at `pointer` in L1 or L2, to be read or written. A bad address is ignored."""
        address = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), [address.type, _LANE, _LANE, _LANE]), "llvm.prefetch.p0"
        )
        self.builder.call(function, [address, *(ir.Constant(_LANE, flag) for flag in (int(write), 4 - level, 1))])

    def prefetch_span(self, pointer, count: int, level: int = 1):
        """Ask for the cache lines of `count` vectors that lie side by side."""
        for offset in range(0, count * self.lanes * self.itemsize, CACHE_LINE):
            self.prefetch(self.at(pointer, index(offset // self.itemsize)), level)

    def multiply_add(self, a, b, c):
        """a*b + c, rounded once where the target can."""
        if not self._fused:
            return self.builder.fadd(self.builder.fmul(a, b), c)
        return self.builder.call(self._declare("llvm.fma", self.type, [self.type] * 3), [a, b, c])

    def in_order(self, registers: list) -> None:
        """Keeps loads that follow behind the computation of what the registers hold.

        Left to itself the compiler may load all that a long stretch of code needs first, into more registers than
        there are.
        """
        kind = _ANY_VECTOR_REGISTER.get(llvm.get_default_triple().split("-")[0])
        if kind is not None:  # an empty piece of assembly that needs them
            vectors = [self.builder.load(register) for register in registers]
            function = ir.FunctionType(ir.VoidType(), [self.type] * len(vectors))
            self.builder.asm(function, "", ",".join([kind] * len(vectors) + ["~{memory}"]), vectors, True)

    def bounded(self, low, high):
        """Whether clamping between the scalars `low` and `high` changes anything."""
        infinity = ir.Constant(low.type, float("inf"))
        below = self.builder.fcmp_ordered("!=", low, ir.Constant(low.type, float("-inf")))
        return self.builder.or_(below, self.builder.fcmp_ordered("!=", high, infinity))

    def at_least(self, low, value):
        """max(low, value), where a NaN of the value stays one."""
        return self.builder.select(self.builder.fcmp_ordered(">", low, value), low, value)

    def clamp(self, value, low, high):
        """min(max(value, low), high) with a NaN left alone: the comparisons are ordered."""
        value = self.at_least(low, value)
        return self.builder.select(self.builder.fcmp_ordered(">", value, high), high, value)

    def _declare(self, name: str, result, arguments, pointer_suffix: str = ""):
        return cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(result, arguments), f"{name}.{self._suffix}{pointer_suffix}"
        )


def vectors_of(builder, signature) -> Vectors:
    """The emitter for the dtype that is the first argument of an intrinsic."""
    return Vectors(builder, signature.args[0], CHOSEN.vector_bytes, CHOSEN.fused)


def emit_cases(builder, value, cases, emit_case) -> None:
    """Runs the code of `emit_case(case)` for the one of `cases`, known at compile time, that `value` is."""
    after, unreachable = builder.append_basic_block("after"), builder.append_basic_block("unreachable")
    choice = builder.switch(value, unreachable)
    for case in cases:
        block = builder.append_basic_block(f"case{case}")
        choice.add_case(index(case), block)
        builder.position_at_end(block)
        emit_case(case)
        builder.branch(after)
    builder.position_at_end(unreachable)
    builder.unreachable()
    builder.position_at_end(after)


@intrinsic
def lanes(typing_context, dtype):
    """Elements of `dtype` in a vector register."""

    def codegen(context, builder, signature, arguments):
        return index(vectors_of(builder, signature).lanes)

    return types.intp(dtype), codegen
