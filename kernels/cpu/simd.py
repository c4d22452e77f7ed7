"""Explicit vector code for Numba: a small emitter of LLVM vector instructions.

Numba leaves vectorisation to LLVM, which may settle for narrower registers than the CPU has. The micro-kernels
say instead which registers they want: they are written with `Vectors`, inside `@intrinsic` functions.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .tiles import CHOSEN, MULTIPLIES_BFLOAT16

CACHE_LINE = 64
L1_PERIOD = 4096  # bytes: addresses so far apart share one set of L1, whose sets are counted within a page

INDEX = ir.IntType(64)
BFLOAT16 = np.uint16  # what kernels are handed as their dtype: Numba has no bfloat16, so its bits stand for it
_LANE = ir.IntType(32)
_ANY_VECTOR_REGISTER = {"x86_64": "v", "aarch64": "w", "arm64": "w"}  # as constraints of inline assembly name it


def index(value: int) -> ir.Constant:
    """A 64-bit integer constant."""
    return ir.Constant(INDEX, value)


def arithmetic_type(dtype: types.NumberClass) -> types.Float:
    """What elements of a dtype are computed in, and their bounds are given in: float32 for bfloat16."""
    return types.float32 if dtype.instance_type == types.uint16 else dtype.instance_type


class Vectors:
    """Emits instructions on vectors of one floating-point type at an IRBuilder's position.

    Addresses are integers (as Numba passes them); offsets count elements. `fused` says whether the target has a
    fused multiply-add: where it has not, `llvm.fma` would be a call into the C library, a hundred times slower.
    """

    factors = 1  # elements of either side that go into a product of a matrix product

    def __init__(self, builder: ir.IRBuilder, dtype: types.NumberClass, vector_bytes: int, fused: bool):
        bits = arithmetic_type(dtype).bitwidth
        self.builder = builder
        self.element = ir.DoubleType() if bits == 64 else ir.FloatType()
        self.itemsize = bits // 8
        self.lanes = vector_bytes // self.itemsize
        self.type = ir.VectorType(self.element, self.lanes)
        self.stored_type = self.type  # what of a vector lies in memory
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

    def broadcast_factors(self, pointer):
        """The factors of one product, loaded into every lane."""
        return self.splat(self.builder.load(pointer, align=self.itemsize))

    def load_factors(self, pointer) -> list:
        """The factors of as many products side by side as a tile has columns, a vector of products each."""
        return self.load_span(pointer, [None] * CHOSEN.vectors)

    def copy_factors(self, line, row_stride, rows, masks: list, copy):
        """The first of `rows` rows, as wide as the tile, written for `load_factors`."""
        for j, value in enumerate(self.load_span(line, masks)):
            self.store(value, self.at(copy, index(j * self.lanes)))

    def add_products(self, a, b, totals):
        """The totals and the products of the factors a and b."""
        return self.multiply_add(a, b, totals)

    def mask(self, count, first: int = 0):
        """A lane mask: lane i is on where `first + i < count`."""
        lane_numbers = ir.Constant(ir.VectorType(INDEX, self.lanes), [first + i for i in range(self.lanes)])
        return self.builder.icmp_signed("<", lane_numbers, self.splat(count))

    def load(self, pointer, mask=None):
        """One vector; lanes that are off read nothing and hold zero."""
        vector = self.builder.bitcast(pointer, self.stored_type.as_pointer())
        if mask is None:
            return self.builder.load(vector, align=self.itemsize)
        nothing = ir.Constant(self.stored_type, None)
        arguments = [vector, ir.Constant(_LANE, self.itemsize), mask, nothing]
        return self._call(f"llvm.masked.load.{_suffix(self.stored_type)}.p0", self.stored_type, arguments)

    def load_span(self, pointer, masks: list) -> list:
        """Vectors that lie side by side, one for each mask (None loads it whole)."""
        return [self.load(self.at(pointer, index(j * self.lanes)), mask) for j, mask in enumerate(masks)]

    def store(self, value, pointer, mask=None):
        """One vector; lanes that are off write nothing."""
        vector = self.builder.bitcast(pointer, self.stored_type.as_pointer())
        if mask is None:
            self.builder.store(value, vector, align=self.itemsize)
        else:
            arguments = [value, vector, ir.Constant(_LANE, self.itemsize), mask]
            self._call(f"llvm.masked.store.{_suffix(self.stored_type)}.p0", ir.VoidType(), arguments)

    def stream(self, value, pointer):
        """One vector, written past the caches. Assumes: the pointer is a multiple of the vector's size."""
        vector = self.builder.bitcast(pointer, self.stored_type.as_pointer())
        instruction = self.builder.store(value, vector, align=self.lanes * self.itemsize)
        instruction.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(_LANE, 1)]))

    def prefetch(self, pointer, level: int = 2, write: bool = False):
        """Ask for the cache line at `pointer` in L1 or L2, to be read or written. A bad address is ignored."""
        address = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), [address.type, _LANE, _LANE, _LANE]), "llvm.prefetch.p0"
        )
        self.builder.call(function, [address, *(ir.Constant(_LANE, flag) for flag in (int(write), 4 - level, 1))])

    def prefetch_span(self, pointer, count: int, level: int = 1, write: bool = False):
        """Ask for the cache lines of `count` vectors that lie side by side."""
        for offset in range(0, count * self.lanes * self.itemsize, CACHE_LINE):
            self.prefetch(self.at(pointer, index(offset // self.itemsize)), level, write)

    def multiply_add(self, a, b, c):
        """a*b + c, rounded once where the target can."""
        if not self._fused:
            return self.builder.fadd(self.builder.fmul(a, b), c)
        return self._call(f"llvm.fma.{_suffix(self.type)}", self.type, [a, b, c])

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

    def _call(self, name: str, result, arguments: list):
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), arguments)


class BFloat16Vectors(Vectors):
    """The same for bfloat16, the upper half of a float32: vectors are of float32, and half as wide in memory.

    A product of a matrix product takes two elements of either side, a[0]*b[0] + a[1]*b[1], as AVX512_BF16 has it in
    one instruction, which takes what is too small for a float32's full precision for zero. Elsewhere it is two
    multiply-adds of float32.
    """

    factors = 2

    def __init__(self, builder: ir.IRBuilder, dtype: types.NumberClass, vector_bytes: int, fused: bool):
        super().__init__(builder, dtype, vector_bytes, fused)
        self.element, self.itemsize = ir.IntType(16), 2
        self.stored_type = ir.VectorType(self.element, self.lanes)
        self._words = ir.VectorType(_LANE, self.lanes)  # a pair of elements, or the bits of a float32, in each lane

    def load(self, pointer, mask=None):
        """One vector; lanes that are off read nothing and hold zero."""
        return self._upper_halves(self._load_words(pointer, mask))

    def store(self, value, pointer, mask=None):
        """One vector, rounded to the nearest; lanes that are off write nothing."""
        super().store(self._rounded(value), pointer, mask)

    def stream(self, value, pointer):
        """The same, written past the caches. Assumes: the pointer is a multiple of the vector's size in memory."""
        super().stream(self._rounded(value), pointer)

    def broadcast_factors(self, pointer):
        """Two elements that lie side by side, loaded into every lane."""
        return self.splat(self.builder.load(self.builder.bitcast(pointer, _LANE.as_pointer()), align=self.itemsize))

    def load_factors(self, pointer) -> list:
        """The factors of as many products side by side as a tile has columns, a vector of products each."""
        line = self.builder.bitcast(pointer, self._words.as_pointer())
        places = [self.builder.gep(line, [index(j)]) for j in range(CHOSEN.vectors)]
        return [self.builder.load(place, align=self.itemsize) for place in places]

    def copy_factors(self, line, row_stride, rows, masks: list, copy):
        """Two rows, or zeros for what of them is not there, written as pairs for `load_factors`."""
        builder, target = self.builder, self.builder.bitcast(copy, self._words.as_pointer())
        one, two = (self.splat(builder.icmp_signed(">", rows, index(row))) for row in (0, 1))
        for j, mask in enumerate(masks):
            first = self.at(line, index(j * self.lanes))
            words = self._load_words(first, builder.and_(mask, one))
            other = self._load_words(self.at(first, row_stride), builder.and_(mask, two))
            pairs = builder.or_(words, builder.shl(other, self._every_lane(16)))
            builder.store(pairs, builder.gep(target, [index(j)]), align=self.itemsize)

    def add_products(self, a, b, totals):
        """The totals and the products of the pairs a and b."""
        builder = self.builder
        if MULTIPLIES_BFLOAT16:
            pairs = [builder.bitcast(side, ir.VectorType(_BFloat16(), 2 * self.lanes)) for side in (a, b)]
            return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", self.type, [totals, *pairs])
        lower = self.multiply_add(self._upper_halves(a), self._upper_halves(b), totals)
        a, b = (builder.bitcast(builder.and_(side, self._every_lane(0xFFFF0000)), self.type) for side in (a, b))
        return self.multiply_add(a, b, lower)

    def _load_words(self, pointer, mask=None):
        """The bits of one vector, each in the lower half of a lane."""
        return self.builder.zext(super().load(pointer, mask), self._words)

    def _upper_halves(self, words):
        """The float32 whose upper halves are the lower ones of words."""
        return self.builder.bitcast(self.builder.shl(words, self._every_lane(16)), self.type)

    def _rounded(self, value):
        """The bits of float32 rounded to bfloat16: to the nearest, of two to the even one."""
        builder = self.builder
        if MULTIPLIES_BFLOAT16:
            kind = ir.VectorType(_BFloat16(), self.lanes)
            name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * self.lanes}"
            return builder.bitcast(self._call(name, kind, [value]), self.stored_type)
        bits = builder.bitcast(value, self._words)
        upper = builder.lshr(bits, self._every_lane(16))
        half = builder.add(builder.and_(upper, self._every_lane(1)), self._every_lane(0x7FFF))
        nearest = builder.lshr(builder.add(bits, half), self._every_lane(16))
        quiet = builder.or_(upper, self._every_lane(0x40))  # the bits of a NaN are not to be added to
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
        return builder.trunc(rounded, self.stored_type)

    def _every_lane(self, word: int):
        return ir.Constant(self._words, [word] * self.lanes)


class _BFloat16(ir.Type):
    """LLVM's type of that name, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _suffix(vector: ir.VectorType) -> str:
    """How LLVM's names of functions tell a type of vectors."""
    letters = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}
    return f"v{vector.count}{letters.get(vector.element) or vector.element}"


def vectors_of(builder, signature) -> Vectors:
    """The emitter for the dtype that is the first argument of an intrinsic."""
    dtype = signature.args[0]
    kind = BFloat16Vectors if dtype.instance_type == types.uint16 else Vectors
    return kind(builder, dtype, CHOSEN.vector_bytes, CHOSEN.fused)


def transposed(builder, square: list) -> list:
    """The transpose of as many vectors as each has lanes: at each distance, pairs exchange their off-diagonal lanes."""
    lanes, square = len(square), list(square)
    distance = 1
    while distance < lanes:
        own = [lane if not lane & distance else lanes + lane - distance for lane in range(lanes)]
        other = [lane + distance if not lane & distance else lanes + lane for lane in range(lanes)]
        masks = [ir.Constant(ir.VectorType(_LANE, lanes), pattern) for pattern in (own, other)]
        for i in range(lanes):
            if not i & distance:
                pair = square[i], square[i | distance]
                square[i], square[i | distance] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        distance *= 2
    return square


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
def infinity(typing_context, dtype):
    """Infinity, as a bound of values of `dtype`: kernels are given bounds in what they compute in."""
    bound = arithmetic_type(dtype)

    def codegen(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(bound), float("inf"))

    return bound(dtype), codegen


@intrinsic
def factors(typing_context, dtype):
    """Elements of either side that go into a product of a matrix product: a pair of bfloat16."""

    def codegen(context, builder, signature, arguments):
        return index(vectors_of(builder, signature).factors)

    return types.intp(dtype), codegen


@intrinsic
def lanes(typing_context, dtype):
    """Elements of `dtype` in a vector register."""

    def codegen(context, builder, signature, arguments):
        return index(vectors_of(builder, signature).lanes)

    return types.intp(dtype), codegen
