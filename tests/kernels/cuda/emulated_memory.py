"""The memories of an emulated card, which watch what is done to them; see `emulator`."""

from __future__ import annotations

import numpy as np

WARP = 32
ALL_LANES = -2  # as a reader
BASE = 1024  # address at which the dynamic shared memory begins


class Memory:
    """An array in device memory."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.flat = array.reshape(-1)
        self.bytes = self.flat.view(np.uint8)
        self.written = np.zeros(self.bytes.size, np.uint8)

    def addresses(self, offset, size: int, threads: int) -> np.ndarray:
        start = np.broadcast_to(np.asarray(offset, np.int64) * self.flat.itemsize, (threads,))
        return start[:, None] + np.arange(size)

    def check(self, addresses: np.ndarray, alignment: int) -> None:
        if addresses.size:
            assert addresses.min() >= 0, "device memory before an array"
            assert addresses.max() < self.bytes.size, "device memory past an array"
            assert not (addresses[:, 0] % alignment).any(), "device memory off its alignment"


class Registers:
    """A local array."""

    def __init__(self, count: int, dtype, threads: int):
        self.rows = np.zeros((count, threads), dtype)

    def __getitem__(self, i):
        return self.rows[i].copy()

    def __setitem__(self, i, value):
        self.rows[i] = value


class SharedMemory:
    """A block's shared memory, word by word, with who touched it since which barrier."""

    def __init__(self, size: int, threads: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        words, warps = size // 4, -(-threads // WARP)
        self.writer = np.full(words, -1)
        self.write_epoch, self.write_sync = np.full(words, -1), np.full(words, -1)
        self.reader = np.full((words, warps), -1)
        self.read_epoch, self.read_sync = np.full((words, warps), -1), np.full((words, warps), -1)
        self.shown_epoch = np.full(words, -1)  # when a fence showed it to the products of warpgroups
        self.products = np.zeros(words, int)  # under way, that read it
        self.epoch = self.sync = 0
        self.conflicts: dict[str, int] = {}

    def barrier(self):
        self.epoch += 1
        self.sync += 1

    def warp_barrier(self):
        self.sync += 1

    def words(self, addresses, size: int) -> np.ndarray:
        at = np.asarray(addresses, np.int64) - BASE
        assert at.min(initial=0) >= 0 and at.max(initial=0) + size <= self.bytes.size, "past shared memory"
        assert not (at % size).any(), "shared memory off its alignment"
        return at[:, None] // 4 + np.arange(size // 4)

    def note_read(self, words, threads):
        threads = np.broadcast_to(threads[:, None], words.shape).ravel()
        words, warps = words.ravel(), threads // WARP
        fresh, other = self.write_epoch[words] == self.epoch, self.writer[words] != threads
        elsewhere = self.writer[words] // WARP != warps
        unsynced = elsewhere | (self.write_sync[words] == self.sync)
        assert not (fresh & other & unsynced).any(), "read what another thread wrote, with no barrier between"
        self.reader[words, warps] = threads
        self.read_epoch[words, warps], self.read_sync[words, warps] = self.epoch, self.sync

    def note_write(self, words, threads):
        threads = np.broadcast_to(threads[:, None], words.shape).ravel()
        words, warps = words.ravel(), threads // WARP
        assert np.unique(words).size == words.size, "two threads write one place"
        assert not self.products[words].any(), "overwrote what products under way may read"
        read = self.read_epoch[words] == self.epoch
        read[np.arange(words.size), warps] &= self.read_sync[words, warps] == self.sync
        read[np.arange(words.size), warps] &= self.reader[words, warps] != threads
        assert not read.any(), "overwrote what another thread read, with no barrier between"
        fresh, other = self.write_epoch[words] == self.epoch, self.writer[words] != threads
        unsynced = (self.writer[words] // WARP != warps) | (self.write_sync[words] == self.sync)
        assert not (fresh & other & unsynced).any(), "overwrote what another thread wrote, with no barrier between"
        self.writer[words], self.write_epoch[words], self.write_sync[words] = threads, self.epoch, self.sync
        self.shown_epoch[words] = -1

    def show(self):
        """All threads show what they wrote to the products of warpgroups."""
        self.shown_epoch[(self.writer >= 0) & (self.shown_epoch < 0)] = self.epoch

    def note_product(self, words):
        assert (self.shown_epoch[words] >= 0).all(), "a product reads what no fence showed it"
        assert (self.shown_epoch[words] < self.epoch).all(), "a product reads with no barrier after the fence"
        self.products[words] += 1

    def note_product_done(self, words, warps):
        self.products[words] -= 1
        at = np.ix_(words, warps)
        self.reader[at], self.read_epoch[at], self.read_sync[at] = ALL_LANES, self.epoch, self.sync

    def count_conflicts(self, kind: str, addresses, threads, size: int):
        """Adds the passes beyond the first that each group of lanes, moving 128 bytes at most, takes."""
        lanes = WARP * 4 // size if size > 4 else WARP
        group, words = threads // lanes, (np.asarray(addresses, np.int64) - BASE) // 4
        for g in np.unique(group):
            touched = np.unique(words[group == g][:, None] + np.arange(size // 4))
            worst = np.bincount(touched % 32).max(initial=1)
            self.conflicts[kind] = self.conflicts.get(kind, 0) + int(worst) - 1
