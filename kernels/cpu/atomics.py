"""Words of memory that several threads read and write at once, for compiled code. All are 64 bits wide.

A word has a place of its own in this process. Code that is kept on the disk knows it by a name: `named_memory`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

WORD = ir.IntType(64)
WORD_SIZE = 8


def named_memory(name: str, memory: ctypes.Array) -> Callable:
    """Makes `memory` known to compiled code; there, what is returned gives its address."""
    keep_for_good(memory)
    llvm.add_symbol(name, ctypes.addressof(memory))

    @intrinsic
    def address_of(typing_context):
        def codegen(context, builder, signature, arguments):
            return builder.ptrtoint(external_word(builder, name), WORD)

        return types.intp(), codegen

    return address_of


def keep_for_good(memory: object) -> None:
    """Never free `memory`, not even as Python ends: a thread of TensorFlow's may still be in a kernel then."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


def external_word(builder, name: str):
    """The pointer to a word that this process knows by name."""
    word = builder.module.globals.get(name) or ir.GlobalVariable(builder.module, WORD, name)
    word.linkage = "external"
    return word


def _pointer(builder, address):
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def load(typing_context, address):
    """The word at `address`."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, *arguments), "seq_cst", WORD_SIZE)

    return types.intp(types.intp), codegen


@intrinsic
def store(typing_context, address, value):
    """Puts `value` at `address`."""

    def codegen(context, builder, signature, arguments):
        address, value = arguments
        builder.store_atomic(value, _pointer(builder, address), "seq_cst", WORD_SIZE)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def add(typing_context, address, amount):
    """Adds `amount` to the word at `address` and returns what it was."""

    def codegen(context, builder, signature, arguments):
        address, amount = arguments
        return builder.atomic_rmw("add", _pointer(builder, address), amount, "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def exchange(typing_context, address, value):
    """Puts `value` at `address` and returns what was there."""

    def codegen(context, builder, signature, arguments):
        address, value = arguments
        return builder.atomic_rmw("xchg", _pointer(builder, address), value, "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def replace(typing_context, address, expected, value):
    """Puts `value` at `address` if `expected` is there, and says whether it was."""

    def codegen(context, builder, signature, arguments):
        address, expected, value = arguments
        result = builder.cmpxchg(_pointer(builder, address), expected, value, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.intp, types.intp, types.intp), codegen
