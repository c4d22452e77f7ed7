"""Runs the kernels of the fast tier without a card: their own Python text, on an emulation of the instructions.

A block runs in lockstep: every value is a NumPy array with one element a thread, so that the text, which has no
branches that depend on the thread, runs once for all of them. What `ptx` and `cuda` offer is replaced by what the PTX
ISA says of it, and by a watch over everything that a card would leave undefined or slow:

- device memory is read and written within its bounds and on its alignment, and results are written once;
- shared memory: what one thread writes and another uses has a barrier between (of the warp, if it is the same warp),
  in both orders; copies under way leave NaN until they are waited for;
- products of warpgroups, which read shared memory beside the threads: see `emulated_warpgroup`;
- banks: what the lanes of a warp access together falls on different banks, else it is counted.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import ml_dtypes
import numpy as np

from fastsepconv.kernels.cuda import (
    channel_vectors,
    depthwise_window,
    gemm_tile,
    partial_sums,
    pointwise_tensor,
    separable_rows,
    transposition,
    warpgroup_tile,
)
from fastsepconv.kernels.cuda.tiles import Launch
from tests.kernels.cuda.emulated_memory import BASE, WARP, Memory, Registers, SharedMemory
from tests.kernels.cuda.emulated_warpgroup import WarpgroupInstructions, toward_zero

# Those whose `cuda` and `ptx` the kernels use.
MODULES = (
    channel_vectors, depthwise_window, gemm_tile, partial_sums, pointwise_tensor, separable_rows, transposition,
    warpgroup_tile,
)  # fmt: skip


class Block:
    """One block of a launch: what stands for `cuda` and for `ptx`."""

    def __init__(self, block: tuple[int, int], threads: int, shared_bytes: int):
        self.threads = threads
        self.lanes = np.arange(threads)
        self.shared = SharedMemory(shared_bytes, threads)
        self.started: list = []
        self.groups: list[list] = []
        self.cuda = SimpleNamespace(
            threadIdx=SimpleNamespace(x=self.lanes),
            blockIdx=SimpleNamespace(x=block[0], y=block[1]),
            local=SimpleNamespace(array=lambda count, dtype: Registers(count, np.dtype(str(dtype)), threads)),
            syncthreads=self.shared.barrier,
            syncwarp=self.shared.warp_barrier,
        )
        names = [name for name in dir(Instructions) if not name.startswith("_")]
        self.instructions = Instructions(self)
        self.ptx = SimpleNamespace(**{name: getattr(self.instructions, name) for name in names})

    def each(self, value, dtype=np.int64) -> np.ndarray:
        """The value in each thread."""
        return np.broadcast_to(np.asarray(value).astype(dtype), (self.threads,))


def _bits(value) -> np.ndarray:
    return np.asarray(value, np.float32).view(np.uint32)


def _float(bits) -> np.ndarray:
    return np.asarray(bits).astype(np.uint32).view(np.float32)


class Instructions(WarpgroupInstructions):
    """The functions of `ptx`, for all threads of a block at once."""

    def shared_memory(self):
        return np.uint32(BASE)

    # Copies

    def _copy(self, width, wanted, shared, pointer, offset, size):
        block = self._block
        wanted, target, size = block.each(wanted, bool), block.each(shared), block.each(size)
        assert ((size >= 0) & (size <= width)).all(), "a copy of more bytes than its width"
        data = np.zeros((block.threads, width), np.uint8)
        addresses = pointer.addresses(offset, width, block.threads)
        inside = wanted[:, None] & (np.arange(width) < size[:, None])
        pointer.check(addresses[inside.any(1)][:, :1], width)
        pointer.check(addresses[inside][:, None], 1)
        data[inside] = pointer.bytes[addresses[inside]]
        words = self._shared.words(target[wanted], width)
        self._shared.note_write(words, block.lanes[wanted])
        self._shared.bytes.view(np.uint32)[words] = 0xFFFFFFFF
        self._shared.count_conflicts("copy", target[wanted], block.lanes[wanted], width)
        block.started.append((words, data[wanted].view(np.uint32), block.lanes[wanted]))

    def copy_async_16(self, *arguments):
        self._copy(16, *arguments)

    def copy_async_8(self, *arguments):
        self._copy(8, *arguments)

    def copy_async_4(self, *arguments):
        self._copy(4, *arguments)

    def commit_copies(self):
        self._block.groups.append(self._block.started)
        self._block.started = []

    def wait_copies(self, groups):
        landing = self._block.groups[: len(self._block.groups) - groups]
        self._block.groups = self._block.groups[len(landing) :]
        for words, data, threads in [copy for group in landing for copy in group]:
            self._shared.note_write(words, threads)
            self._shared.bytes.view(np.uint32)[words] = data

    # Shared memory

    def _matrices(self, count, transposed, registers, i, shared):
        block = self._block
        addresses = block.each(shared).reshape(-1, WARP)[:, : 8 * count]
        threads = block.lanes.reshape(-1, WARP)[:, : 8 * count]
        words = self._shared.words(addresses.ravel(), 16)
        self._shared.note_read(words, threads.ravel())
        # Eight lanes name the rows of one matrix, and are served together, whatever the count.
        self._shared.count_conflicts("matrix", addresses.ravel(), threads.ravel(), 16)
        rows = self._shared.bytes.view(np.uint32)[words].view(np.uint16).reshape(-1, count, 8, 8)
        matrices = rows.swapaxes(2, 3) if transposed else rows
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)  # lane = 4*row + pair of row
        for j in range(count):
            registers[i + j] = pairs[:, j].ravel()

    def load_matrices_4(self, *arguments):
        self._matrices(4, False, *arguments)

    def load_matrices_2(self, *arguments):
        self._matrices(2, False, *arguments)

    def load_matrices_4_transposed(self, *arguments):
        self._matrices(4, True, *arguments)

    def load_matrices_2_transposed(self, *arguments):
        self._matrices(2, True, *arguments)

    def _load_shared(self, shared, size):
        addresses = self._block.each(shared)
        words = self._shared.words(addresses, size)
        self._shared.note_read(words, self._block.lanes)
        self._shared.count_conflicts(f"load{8 * size}", addresses, self._block.lanes, size)
        return self._shared.bytes.view(np.uint32)[words]

    def load_shared_32(self, shared):
        return self._load_shared(shared, 4)[:, 0]

    def load_shared_128(self, registers, i, shared):
        registers.rows[i : i + 4] = self._load_shared(shared, 16).T

    def _store_shared(self, wanted, shared, *values):
        lanes = self._block.lanes[self._block.each(wanted, bool)]
        addresses, size = self._block.each(shared)[lanes], 4 * len(values)
        words = self._shared.words(addresses, size)
        self._shared.note_write(words, lanes)
        self._shared.count_conflicts(f"store{8 * size}", addresses, lanes, size)
        self._shared.bytes.view(np.uint32)[words] = np.stack([self._block.each(v, np.uint32)[lanes] for v in values], 1)

    def store_shared_32(self, shared, value):
        self._store_shared(True, shared, value)

    def store_shared_64(self, shared, first, second):
        self._store_shared(True, shared, first, second)

    def store_shared_128(self, wanted, shared, registers, i):
        self._store_shared(wanted, shared, *registers.rows[i : i + 4])

    # Device memory

    def _load_global(self, size, wanted, pointer, offset):
        wanted = self._block.each(wanted, bool)
        addresses = pointer.addresses(offset, size, self._block.threads)
        pointer.check(addresses[wanted], size)
        data = np.zeros((self._block.threads, size), np.uint8)
        data[wanted] = pointer.bytes[addresses[wanted]]
        return data

    def load_global_128(self, registers, i, wanted, pointer, offset):
        registers.rows[i : i + 4] = self._load_global(16, wanted, pointer, offset).view(np.uint32).T

    def load_global_64(self, registers, i, wanted, pointer, offset):
        registers.rows[i : i + 2] = self._load_global(8, wanted, pointer, offset).view(np.uint32).T

    def load_global_32(self, wanted, pointer, offset):
        return self._load_global(4, wanted, pointer, offset).view(np.uint32)[:, 0]

    def _store_global(self, wanted, pointer, offset, values):
        wanted, size = self._block.each(wanted, bool), values.dtype.itemsize * values.shape[1]
        addresses = pointer.addresses(offset, size, self._block.threads)[wanted]
        pointer.check(addresses, size)
        np.add.at(pointer.written, addresses, 1)
        pointer.bytes[addresses] = np.ascontiguousarray(values).view(np.uint8)[wanted]

    def store_global_128(self, wanted, pointer, offset, registers, i):
        self._store_global(wanted, pointer, offset, np.ascontiguousarray(registers.rows[i : i + 4].T))

    def store_global_64(self, wanted, pointer, offset, registers, i):
        self._store_global(wanted, pointer, offset, np.ascontiguousarray(registers.rows[i : i + 2].T))

    def store_global_32(self, wanted, pointer, offset, value):
        self._store_global(wanted, pointer, offset, self._block.each(value, np.uint32)[:, None])

    # Products

    def _multiply(self, per_register, decode, sums, i, a, j, b, k):
        """D = A.B + C by the fragment tables of the ISA: A 16 rows, B 8 columns, 8 * per_register deep."""
        warps, depth = self._block.threads // WARP, 8 * per_register
        group, place = np.arange(WARP) // 4, np.arange(WARP) % 4
        left, right = np.empty((warps, 16, depth)), np.empty((warps, depth, 8))
        for register, values in enumerate(decode(a.rows[j : j + 4])):  # [per_register, threads]
            for part in range(per_register):
                columns = place * per_register + part + (depth // 2 if register >= 2 else 0)
                left[:, group + 8 * (register % 2), columns] = values[part].reshape(warps, WARP)
        for register, values in enumerate(decode(b.rows[k : k + 2])):
            for part in range(per_register):
                rows = place * per_register + part + (depth // 2) * register
                right[:, rows, group] = values[part].reshape(warps, WARP)
        with np.errstate(invalid="ignore"):
            product = left @ right
        for register in range(4):
            rows, columns = group + 8 * (register // 2), 2 * place + register % 2
            before = sums.rows[i + register].reshape(warps, WARP).astype(np.float64)
            sums.rows[i + register] = toward_zero(before + product[:, rows, columns]).ravel()

    def multiply_tf32(self, *arguments):
        def decode(registers):
            assert not (registers & 0x1FFF).any() or np.isnan(_float(registers)).any(), "not rounded to tf32"
            return [[_float(register).astype(np.float64)] for register in registers]

        self._multiply(1, decode, *arguments)

    def multiply_bf16(self, *arguments):
        self._multiply(2, lambda rows: [[self.low_bf16(r), self.high_bf16(r)] for r in rows], *arguments)

    def multiply_f16(self, *arguments):
        self._multiply(2, lambda rows: [[self.low_f16(r), self.high_f16(r)] for r in rows], *arguments)

    # Numbers

    def bits_of(self, value):
        return _bits(value)

    def float_of(self, bits):
        return _float(bits)

    def round_tf32(self, value):
        bits = _bits(value)
        return np.where(np.isfinite(value), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)

    def _pack(self, dtype, low, high):
        with np.errstate(over="ignore"):
            parts = [np.asarray(v, np.float32).astype(dtype).view(np.uint16).astype(np.uint32) for v in (low, high)]
        return parts[0] | parts[1] << 16

    def pack_bf16(self, low, high):
        return self._pack(ml_dtypes.bfloat16, low, high)

    def pack_f16(self, low, high):
        return self._pack(np.float16, low, high)

    def low_bf16(self, bits):
        return _float(np.asarray(bits).astype(np.uint32) << 16)

    def high_bf16(self, bits):
        return _float(np.asarray(bits).astype(np.uint32) & np.uint32(0xFFFF0000))

    def _half(self, bits):
        return np.asarray(bits).astype(np.uint16).view(np.float16).astype(np.float32)

    def low_f16(self, bits):
        return self._half(np.asarray(bits) & 0xFFFF)

    def high_f16(self, bits):
        return self._half(np.asarray(bits).astype(np.uint32) >> 16)


def clear_caches(modules) -> None:
    """Forgets the functions that the modules made: they hold the instructions that they were made with."""
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def run(modules, factory, factory_arguments, sizes, arguments) -> SimpleNamespace:
    """Runs the kernel that `factory(*factory_arguments)` makes, and gives what was watched.

    `sizes` are those that its launch follows from, or are a Launch.

    `modules` are those whose `cuda` and `ptx` the kernel uses; arrays among the arguments become device memory, whose
    present contents count as unwritten. Gives the bank conflicts by kind, and the largest number of times that a
    byte of each array was written.
    """
    clear_caches(modules)
    memories = [Memory(a) if isinstance(a, np.ndarray) else a for a in arguments]
    kernel = factory(*factory_arguments)
    launch = sizes if isinstance(sizes, Launch) else kernel.launch(*sizes)
    assert kernel.launch_bounds[0] == launch.block
    conflicts: dict[str, int] = {}
    for y in range(launch.grid[1]):
        for x in range(launch.grid[0]):
            block = Block((x, y), launch.block, launch.shared_bytes)
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(patch.object(module, "cuda", block.cuda, create=True))
                    stack.enter_context(patch.object(module, "ptx", block.ptx, create=True))
                # Made anew, since what a kernel is composed of is looked up when it is made.
                clear_caches(modules)
                factory(*factory_arguments).function(*memories)
            assert not any(block.groups) and not block.started, "copies left under way"
            block.instructions._assert_done()
            for kind, count in block.shared.conflicts.items():
                conflicts[kind] = conflicts.get(kind, 0) + count
    clear_caches(modules)
    written = [int(m.written.max(initial=0)) for m in memories if isinstance(m, Memory)]
    return SimpleNamespace(conflicts=conflicts, written=written, launch=launch)
