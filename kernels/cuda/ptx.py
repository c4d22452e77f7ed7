"""Single PTX instructions, callable from a Numba kernel: what the compiler does not emit by itself.

Memory is named in two ways: shared memory by a byte address (`shared_memory()` and up), device memory by a pointer and
an offset in elements. `wanted` predicates an access: a lane where it is false touches nothing, and a load then gives
zeros. `registers, i` names consecutive elements of a local array, which the compiler keeps in registers as long as
`i` is a constant after unrolling; 16-bit elements stand two in an unsigned 32-bit register, the first one low.

Source: PTX ISA, the sections on mma, wgmma, ldmatrix, cp.async and cvt.
"""

from __future__ import annotations

from functools import cache
from inspect import Parameter, Signature

from llvmlite import ir
from numba import types
from numba.cuda import cgutils
from numba.cuda.extending import intrinsic

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LETTERS = {_I32: "r", _I64: "l", _F32: "f"}
_SHARED = 3  # the address space


class Operand:
    """How arguments of an instruction become operands: `takes` of them are read, giving values of LLVM types."""

    takes = 1

    def values(self, context, builder, argument_types, arguments) -> list:
        raise NotImplementedError


class Integer(Operand):
    """Any integer or boolean, as 32 bits."""

    def values(self, context, builder, argument_types, arguments):
        value = arguments[0]
        if value.type.width > 32:
            value = builder.trunc(value, _I32)
        return [builder.zext(value, _I32) if value.type.width < 32 else value]


class Wide(Operand):
    """An integer of 64 bits."""

    def values(self, context, builder, argument_types, arguments):
        return [arguments[0]]


class Float(Operand):
    """A float32."""

    def values(self, context, builder, argument_types, arguments):
        return [arguments[0]]


class Address(Operand):
    """A pointer into device memory and an offset in elements."""

    takes = 2

    def values(self, context, builder, argument_types, arguments):
        pointer, offset = arguments
        if offset.type.width < 64:
            offset = builder.sext(offset, _I64)
        itemsize = ir.Constant(_I64, argument_types[0].dtype.bitwidth // 8)
        return [builder.add(builder.ptrtoint(pointer, _I64), builder.mul(offset, itemsize))]


class Registers(Operand):
    """`count` consecutive elements of a local array from an index on."""

    takes = 2

    def __init__(self, count: int):
        self.count = count

    def pointers(self, context, builder, argument_types, arguments) -> list:
        array = context.make_array(argument_types[0])(context, builder, arguments[0])
        index = arguments[1]
        if index.type.width < 64:
            index = builder.sext(index, _I64)
        return [builder.gep(array.data, [builder.add(index, ir.Constant(_I64, i))]) for i in range(self.count)]

    def values(self, context, builder, argument_types, arguments):
        return [builder.load(pointer) for pointer in self.pointers(context, builder, argument_types, arguments)]


def _call(builder, text: str, outputs: list, operands: list, effect: bool, tied: int = 0) -> list:
    """Emits one piece of inline assembly and gives its outputs; the last `tied` operands are their registers before."""
    letters = ["=" + _LETTERS[output] for output in outputs] + [_LETTERS[operand.type] for operand in operands]
    letters = letters[: len(letters) - tied] + [str(i) for i in range(tied)]
    result = ir.LiteralStructType(outputs) if len(outputs) > 1 else outputs[0] if outputs else ir.VoidType()
    function = ir.FunctionType(result, [operand.type for operand in operands])
    constraints = ",".join(letters + ["~{memory}"] * effect)
    value = builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), operands)
    return [builder.extract_value(value, i) for i in range(len(outputs))] if len(outputs) > 1 else [value]


def _operands(kinds, context, builder, argument_types, arguments) -> list:
    found, start = [], 0
    for kind in kinds:
        span = slice(start, start + kind.takes)
        found += kind.values(context, builder, argument_types[span], arguments[span])
        start += kind.takes
    return found


def _intrinsic(definition, count: int):
    """Numba's intrinsic with `count` parameters, where the definition takes any number."""
    names = ["typing_context", *(f"argument{i}" for i in range(count))]
    definition.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_ONLY) for name in names])
    return intrinsic(definition)


def _instruction(text: str, *kinds: Operand, result=None, effect: bool = False):
    """An instruction that takes operands of these kinds and gives one value, or none."""

    def instruction(typing_context, *arguments):
        def codegen(context, builder, signature, values):
            outputs = [] if result is None else [context.get_value_type(result)]
            operands = _operands(kinds, context, builder, signature.args, values)
            value = _call(builder, text, outputs, operands, effect)[0]
            return context.get_dummy_value() if result is None else value

        return (types.void if result is None else result)(*arguments), codegen

    return _intrinsic(instruction, sum(kind.takes for kind in kinds))


def _filling(
    text: str, target: Registers, *kinds: Operand, update: bool = False, tied: bool = False, effect: bool = False
):
    """An instruction that fills registers, and reads them first if it updates them; in the same ones if `tied`."""

    def instruction(typing_context, *arguments):
        def codegen(context, builder, signature, values):
            pointers = target.pointers(context, builder, signature.args[:2], values[:2])
            operands = _operands(kinds, context, builder, signature.args[2:], values[2:])
            if update:
                operands += [builder.load(pointer) for pointer in pointers]
            outputs = [context.get_data_type(signature.args[0].dtype)] * target.count
            values = _call(builder, text, outputs, operands, effect, target.count if tied else 0)
            for value, pointer in zip(values, pointers, strict=True):
                builder.store(value, pointer)
            return context.get_dummy_value()

        return types.void(*arguments), codegen

    return _intrinsic(instruction, 2 + sum(kind.takes for kind in kinds))


def _if_wanted(predicate: str, action: str, *otherwise: str) -> str:
    """The action where the predicate holds, else the others. No output is written before the last input is read."""
    others = "".join(f" @!%p {other}" for other in otherwise)
    return f"{{ .reg .pred %p; setp.ne.b32 %p, {predicate}, 0; @%p {action}{others} }}"


@intrinsic
def shared_memory(typing_context):
    """The address of the block's dynamic shared memory, whose size the launch gives."""

    def codegen(context, builder, signature, arguments):
        name = "dynamic_shared_memory"
        memory = builder.module.globals.get(name)
        if memory is None:
            memory = cgutils.add_global_variable(builder.module, ir.ArrayType(ir.IntType(8), 0), name, _SHARED)
            memory.align = 16
        return builder.ptrtoint(memory, _I32)

    return types.uint32(), codegen


def _copy(size: int, cache: str):
    text = _if_wanted("$0", f"cp.async.{cache}.shared.global [$1], [$2], {size}, $3;")
    return _instruction(text, Integer(), Integer(), Address(), Integer(), effect=True)


# (wanted, shared, pointer, offset, size): starts a copy to shared memory; bytes from `size` on are zeros, not read.
copy_async_16 = _copy(16, "cg")
copy_async_8 = _copy(8, "ca")
copy_async_4 = _copy(4, "ca")

# The copies that this thread started since the last commit become one group.
commit_copies = _instruction("cp.async.commit_group;", effect=True)


@intrinsic
def wait_copies(typing_context, groups):
    """Waits until no more than the last `groups`, a constant, of this thread's groups of copies are under way."""
    if not isinstance(groups, types.IntegerLiteral):
        return None  # asked again with the constant

    def codegen(context, builder, signature, arguments):
        _call(builder, f"cp.async.wait_group {groups.literal_value};", [], [], True)
        return context.get_dummy_value()

    return types.void(groups), codegen


def _matrices(count: int, suffix: str):
    targets = ", ".join(f"${i}" for i in range(count))
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{targets}}}, [${count}];"
    return _filling(text, Registers(count), Integer(), effect=True)


# (registers, i, shared): 8x8 matrices of 16-bit elements; lane 8*j + r gives the address of row r of matrix j.
load_matrices_4 = _matrices(4, "")
load_matrices_2 = _matrices(2, "")
load_matrices_4_transposed = _matrices(4, ".trans")
load_matrices_2_transposed = _matrices(2, ".trans")


def _multiply(shape: str, kind: str):
    c, a, b, d = (", ".join(f"${first + i}" for i in range(n)) for first, n in ((10, 4), (4, 4), (8, 2), (0, 4)))
    text = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};"
    return _filling(text, Registers(4), Registers(4), Registers(2), update=True)


# (sums, i, a, j, b, k): the warp's 16x8 tile of sums += a.b, over 8 (tf32) or 16 (half types) products each.
multiply_tf32 = _multiply("m16n8k8", "tf32")
multiply_bf16 = _multiply("m16n8k16", "bf16")
multiply_f16 = _multiply("m16n8k16", "f16")


@cache
def multiply_by_warpgroup(kind: str, columns: int, a_wide: bool, b_wide: bool):
    """(sums, i, a, b): 64 rows by `columns` of sums += a.b, 8 (tf32) or 16 (half types) deep, of four warps together.

    a and b are descriptors of matrices in shared memory, which are read, as the sums are, until `wait_products` says
    so. `wide` ones have the rows of A or the columns of B side by side, others the depth; as tf32 there are no wide
    ones, and the last 13 bits of each number are dropped. For sm_90a alone.
    """
    if kind == "tf32" and (a_wide or b_wide):
        raise ValueError("Warpgroups transpose no TF32.")
    depth, orders = (8, "") if kind == "tf32" else (16, f", {int(a_wide)}, {int(b_wide)}")
    sums = Registers(columns // 2)
    targets = ", ".join(f"${i}" for i in range(sums.count))
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} {{{targets}}}, "
        f"${sums.count}, ${sums.count + 1}, 1, 1, 1{orders};"
    )
    return _filling(text, sums, Wide(), Wide(), update=True, tied=True, effect=True)


@cache
def wait_products(count: int):
    """(sums, i): waits for all of this warpgroup's products, so that `count` sums can be read."""
    return _filling("wgmma.wait_group.sync.aligned 0;", Registers(count), update=True, tied=True, effect=True)


# Before the first product, and after sums were written by others: orders them. Then products become one group.
fence_products = _instruction("wgmma.fence.sync.aligned;", effect=True)
commit_products = _instruction("wgmma.commit_group.sync.aligned;", effect=True)
wait_all_products_but_one_group = _instruction("wgmma.wait_group.sync.aligned 1;", effect=True)

# What this thread wrote or copied to shared memory can be read by products, after a barrier.
fence_shared = _instruction("fence.proxy.async.shared::cta;", effect=True)

# (shared) -> 32 bits, (registers, i, shared), (shared, value), (wanted, shared, registers, i)
load_shared_32 = _instruction("ld.shared.b32 $0, [$1];", Integer(), result=types.uint32, effect=True)
load_shared_128 = _filling("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", Registers(4), Integer(), effect=True)
store_shared_32 = _instruction("st.shared.b32 [$0], $1;", Integer(), Integer(), effect=True)
store_shared_64 = _instruction("st.shared.v2.b32 [$0], {$1, $2};", Integer(), Integer(), Integer(), effect=True)
store_shared_128 = _instruction(
    _if_wanted("$0", "st.shared.v4.b32 [$1], {$2, $3, $4, $5};"), Integer(), Integer(), Registers(4), effect=True
)


def _load_global(count: int):
    zeros = [f"mov.b32 ${i}, 0;" for i in range(count)]
    targets = ", ".join(f"${i}" for i in range(count))
    action = f"ld.global.nc.v{count}.b32 {{{targets}}}, [${count + 1}];"
    return _filling(_if_wanted(f"${count}", action, *zeros), Registers(count), Integer(), Address(), effect=True)


def _store_global(count: int):
    values = ", ".join(f"${2 + i}" for i in range(count))
    text = _if_wanted("$0", f"st.global.v{count}.b32 [$1], {{{values}}};")
    return _instruction(text, Integer(), Address(), Registers(count), effect=True)


# (registers, i, wanted, pointer, offset): 16 or 8 bytes; and (wanted, pointer, offset) -> 32 bits.
# What is loaded so does not change while the kernel runs.
load_global_128 = _load_global(4)
load_global_64 = _load_global(2)
load_global_32 = _instruction(
    _if_wanted("$1", "ld.global.nc.b32 $0, [$2];", "mov.b32 $0, 0;"),
    Integer(),
    Address(),
    result=types.uint32,
    effect=True,
)

# (wanted, pointer, offset, registers, i) and (wanted, pointer, offset, value)
store_global_128 = _store_global(4)
store_global_64 = _store_global(2)
store_global_32 = _instruction(
    _if_wanted("$0", "st.global.b32 [$1], $2;"), Integer(), Address(), Integer(), effect=True
)

# Numbers and their bits. The rounding ones round to nearest; tf32's ties go away from zero, the others' to even.
bits_of = _instruction("mov.b32 $0, $1;", Float(), result=types.uint32)
float_of = _instruction("mov.b32 $0, $1;", Integer(), result=types.float32)
round_tf32 = _instruction("cvt.rna.tf32.f32 $0, $1;", Float(), result=types.uint32)
pack_bf16 = _instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", Float(), Float(), result=types.uint32)
pack_f16 = _instruction("cvt.rn.f16x2.f32 $0, $2, $1;", Float(), Float(), result=types.uint32)
low_bf16 = _instruction("shl.b32 $0, $1, 16;", Integer(), result=types.float32)
high_bf16 = _instruction("and.b32 $0, $1, 0xffff0000;", Integer(), result=types.float32)
_HALF = "{{ .reg .b16 %l, %h; mov.b32 {{%l, %h}}, $1; cvt.f32.f16 $0, %{}; }}"
low_f16 = _instruction(_HALF.format("l"), Integer(), result=types.float32)
high_f16 = _instruction(_HALF.format("h"), Integer(), result=types.float32)
