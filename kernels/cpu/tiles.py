"""Which register tile this CPU gets: a table, each row with its reason, and the choice among them.

A tile is a number of registers, so it follows from the vector width and the number of vector registers. The choice
is made once, at import, from what Numba's compiler may use: the features of the host, or those that
NUMBA_CPU_FEATURES lists and those that the CPU named by NUMBA_CPU_NAME always has. FASTSEPCONV_TILE names a tile by
hand, which is how each is tested on a single machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import NamedTuple

import llvmlite.binding as llvm
from numba.core import config
from numba.core.registry import cpu_target


class Tile(NamedTuple):
    """The register blocking of the micro-kernels on one class of CPU."""

    name: str
    vector_bytes: int
    registers: int  # vector registers
    fused: bool  # the CPU has a fused multiply-add
    rows: tuple[int, ...]  # pointwise: rows of the output tile; the first is the fastest, the others serve remainders
    vectors: int  # pointwise: vectors in a row of the output tile
    unroll: int  # pointwise: products in a turn of the inner loop
    ask_step: int  # pointwise: products for which one cache line is asked for
    broadcasts: bool  # a multiply-add takes a scalar in memory for a vector
    pixels: int  # depthwise: output pixels at once
    span: int  # depthwise: channel vectors at once
    slides: tuple[int, ...]  # depthwise with taps one pixel apart: output pixels at once, falling to 1
    slide_span: int  # and channel vectors
    reason: str
    matrices: bool = False  # float32 and bfloat16 are multiplied in AMX's registers of 16 rows, see `amx_tile`


TILES = (
    Tile(
        "amx", 64, 32, True, (14, 12, 10, 8, 4, 2), 2, 4, 1, True, 4, 4, (8, 4, 3, 2, 1), 2,
        "products of float32 and bfloat16 in AMX's registers, of which 2x2 hold sums and 2 each what is multiplied; "
        "all else as with avx512",
        matrices=True,
    ),
    Tile(
        "avx512", 64, 32, True, (14, 12, 10, 8, 4, 2), 2, 4, 1, True, 4, 4, (8, 4, 3, 2, 1), 2,
        "14x2 accumulators, 2 kernel vectors and a broadcast fill 31 of 32 registers; 23 loads feed 28 multiply-adds; "
        "4 products a turn, since a core with two units of 512 bits has but 56 cycles for all that it starts in one; "
        "one line asked for a product, since blocks of few tiles need that many",
    ),
    Tile(
        "avx2", 32, 16, True, (6, 4, 2), 2, 4, 4, False, 4, 2, (8, 4, 3, 2, 1), 1,
        "6x2 accumulators, 2 kernel vectors and a broadcast fill 15 of 16 registers; 4 products a turn, since the 12 "
        "multiply-adds of one leave a core no time for all that a loop does besides, and but one line is asked for",
    ),
    Tile(
        "neon", 16, 32, True, (8, 4, 2), 3, 2, 1, False, 4, 4, (8, 4, 3, 2, 1), 2,
        "8x3 accumulators, 3 kernel vectors and a broadcast fill 28 of 32 registers",
    ),
    Tile(
        "portable", 16, 16, False, (4, 2), 2, 4, 4, False, 2, 2, (8, 4, 3, 2, 1), 1,
        "4x2 accumulators leave some of 16 registers of 128 bits for products, where there is no fused multiply-add",
    ),
)  # fmt: skip

_WANTED = {
    "amx": "zmm",
    "avx512": "zmm",
    "avx2": "ymm",
    "neon": "fmla",
}  # what the compiler must emit for the tile to make sense


def _emits(vector_bytes: int, word: str) -> bool:
    """Whether Numba's target compiles a fused multiply-add of that width to one instruction holding `word`."""
    vector = f"<{vector_bytes // 4} x float>"
    source = (
        f"declare {vector} @llvm.fma.v{vector_bytes // 4}f32({vector}, {vector}, {vector})\n"
        f"define {vector} @f({vector} %a, {vector} %b, {vector} %c) {{\n"
        f"  %r = call {vector} @llvm.fma.v{vector_bytes // 4}f32({vector} %a, {vector} %b, {vector} %c)\n"
        f"  ret {vector} %r\n}}\n"
    )
    name, features = target()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=name, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(source))
    lines = [line for line in assembly.splitlines() if word in line]
    return any("fma" in line or "fmla" in line for line in lines)


def target() -> tuple[str, str]:
    """The CPU name and the feature string that Numba compiles for."""
    codegen = cpu_target.target_context.codegen()
    _, name, features = codegen.magic_tuple()
    return name, features


def keeps_host_features() -> bool:
    """Whether NUMBA_CPU_NAME names another CPU than the host, but Numba takes the host's features: its own rule."""
    return config.CPU_NAME not in (None, llvm.get_host_cpu_name()) and config.CPU_FEATURES is None


def _has_matrices() -> bool:
    """Whether the CPU has AMX for bfloat16, and the system lets this process use it.

    Linux saves the 8 KiB of its registers for those processes alone that ask, once for all their threads.
    """
    wanted = {"+amx-tile", "+amx-bf16", "+avx512bf16"}
    if platform.system() != "Linux" or not wanted <= set(target()[1].split(",")):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _is_usable(tile: Tile) -> bool:
    if tile.matrices and not _has_matrices():
        return False
    return tile.name == "portable" or _emits(tile.vector_bytes, _WANTED[tile.name])


def _choose() -> Tile:
    by_name = {tile.name: tile for tile in TILES}
    wanted = os.environ.get("FASTSEPCONV_TILE", "")
    if wanted and wanted not in by_name:
        raise ValueError(
            "Invalid value for environment variable `FASTSEPCONV_TILE`. "
            f"Expected one of {', '.join(by_name)}. Received: FASTSEPCONV_TILE={wanted}"
        )
    if not wanted:
        return next(filter(_is_usable, TILES))
    if not _is_usable(by_name[wanted]):  # no other is asked for: AMX would be requested, which the process keeps
        usable = ", ".join(tile.name for tile in filter(_is_usable, TILES))
        raise ValueError(
            "Invalid value for environment variable `FASTSEPCONV_TILE`. "
            f"Expected a tile that {target()[0]} can run: {usable}. "
            f"Received: FASTSEPCONV_TILE={wanted}"
        )
    return by_name[wanted]


def explain() -> str:
    """One sentence: the tile chosen, for which CPU, and why."""
    how = "named by FASTSEPCONV_TILE" if os.environ.get("FASTSEPCONV_TILE") else "chosen"
    cpu = config.CPU_NAME or target()[0]
    return f"tile {CHOSEN.name} {how} for {cpu}: {CHOSEN.reason}"


def _multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies and adds pairs of bfloat16 in one instruction, in vectors as wide as the tile's.

    LLVM ends the process at an instruction that the target lacks, so the target's features are asked.
    """
    return CHOSEN.vector_bytes == 64 and "+avx512bf16" in target()[1].split(",")


CHOSEN = _choose()
MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()
