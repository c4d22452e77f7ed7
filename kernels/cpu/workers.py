"""The package's own threads, on Linux: they look out for work a moment, then sleep, and keep off their caller's CPU.

Between two kernels TensorFlow computes on threads of its own, as many as there are CPUs. TBB's threads spin for a
millisecond after each piece of parallel work, and the scheduler likes to wake a thread on the CPU of its waker: now
two busy threads share a CPU while another has none. Whole networks lost 5 to 10 % by that (Zen 4, 2 cores).
Where a single thread goes from call to call, on the other hand, a worker that stays awake makes a layer in TensorFlow
some 3 % faster (Zen 5, 2 cores). So an only worker looks out for longer where its CPU would be idle otherwise.

    caller:  claim a job -> fill it -> open it -> wake sleepers -> take shares of it -> close it -> wait for its helpers
    worker:  for each open job: join, take shares, leave -> look out for another -> sleep

Each share is taken by whoever comes first. A caller that finds all jobs claimed does its shares alone.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import sys

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import atomics, quota
from .atomics import WORD, WORD_SIZE
from .clock import monotonic_ns, process_ns
from .jit import callback, kernel

LOOK_OUT_NS = 50_000  # how long a worker looks out for work before it sleeps: longer than a caller's serial stretches
LONG_LOOK_OUT_NS = 500_000  # the same where its CPU would be idle: longer than TensorFlow takes from call to call
ALONE = 130  # percent of a CPU that the process uses then, at most: 90 to 130 between calls, 140 to 190 in a network
TAKEN_NS = 250_000  # without its CPU for longer, a worker that looks out has met a thread that computes
PATIENCE_NS = 1_000_000  # how long a caller stays awake for a helper that has lost its CPU
JOBS = 16  # how many callers have helpers at once
MOST_KEPT_OFF = 8  # workers; with more of them a machine has more CPUs, and the scheduler finds a free one
CPU_SET_SIZE = 128  # bytes, the C library's

_LINE = 64  # bytes: what one thread writes often shares no cache line with what another does
# Where the pool's words lie, in bytes.
_OPENED, _SLEEPERS, _STOPPING, _KEPT_OFF, _SEMAPHORE, _THREADS, _FOUND, _JOBS = (i * _LINE for i in (*range(7), 8))
_NOTED, _SLEPT, _USED = (_SLEEPERS + i * 8 for i in (1, 2, 3))  # whether it is noted how many ns the worker slept
# lately, and how many ns of CPU time the process used meanwhile
_MASKS, _MOVING = _KEPT_OFF + 8, _KEPT_OFF + 16  # the address of a CPU set for each CPU kept off, or 0; a lock
_STATE, _NEXT, _ENTRY, _PACKED, _SHARES, _HELPERS, _JOB_SIZE = 0, 64, 128, 136, 144, 152, 192
_CLAIMED, _OPEN = 1 << 40, 1 << 41  # a job's state: 0 if free, else one of these, plus the workers that are at it now
_CPUS = 8 * CPU_SET_SIZE
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # times a number, it scatters that over all words

# The instruction that tells a processor that a loop waits: LLVM's name for it and its operands.
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [ir.IntType(32)(1)])}

_words = (ctypes.c_int64 * ((_JOBS + JOBS * _JOB_SIZE) // WORD_SIZE))()
_pool = atomics.named_memory("fastsepconv_workers", _words)
_members: list[ctypes.c_void_p] = []  # POSIX threads: they are nothing to Python, which knows them only by address


def _c_function(name: str, parameters: int) -> types.ExternalFunction:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        llvm.add_symbol(f"fastsepconv_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(f"fastsepconv_{name}", types.int32(*[types.intp] * parameters))


_sem_post = _c_function("sem_post", 1)
_sem_wait = _c_function("sem_wait", 1)
_sched_getcpu = _c_function("sched_getcpu", 0)
_sched_yield = _c_function("sched_yield", 0)
_usleep = _c_function("usleep", 1)
_setaffinity = _c_function("pthread_setaffinity_np", 3)
_getaffinity = _c_function("pthread_getaffinity_np", 3)


def available() -> bool:
    """Whether this pool can be had here."""
    return sys.platform == "linux" and sys.maxsize > 2**32 and platform.machine() in _PAUSES


def start(count: int) -> int:
    """Start `count` workers, or as many as the system allows. Called again after an interrupt, it starts the others.

    Returns:
        The address of a function that does parallel work, with the parameters of Numba's `numba_parallel_for`.
    """
    address, work = _run.address, ctypes.c_void_p(_work.address)
    library = ctypes.CDLL(None)
    if not _members:
        library.sem_init(ctypes.byref(_words, _SEMAPHORE), 0, 0)
        atexit.register(_stop, os.getpid())
    while len(_members) < count:
        member = ctypes.c_void_p()
        if library.pthread_create(ctypes.byref(member), None, work, None) != 0:
            break
        _members.append(member)
    _words[_NOTED // WORD_SIZE] = len(_members) == 1 and quota.cpus() is None
    _prepare_to_keep_off()
    return address


def _prepare_to_keep_off() -> None:
    """For each CPU, the set of those that workers may run on while their caller is there; the last row is all."""
    allowed = os.sched_getaffinity(0)
    if not len(_members) < len(allowed) or len(_members) > MOST_KEPT_OFF or max(allowed) >= _CPUS:
        return
    masks = np.zeros((_CPUS + 1, CPU_SET_SIZE), np.uint8)
    for cpu in allowed:
        masks[:, cpu // 8] |= np.uint8(1 << cpu % 8)
        masks[cpu, cpu // 8] &= np.uint8(~(1 << cpu % 8) & 255)
    atomics.keep_for_good(masks)
    for i, member in enumerate(_members):
        _words[_THREADS // WORD_SIZE + i] = member.value or 0
    _words[_KEPT_OFF // WORD_SIZE] = _CPUS
    _words[_MASKS // WORD_SIZE] = masks.ctypes.data


def _stop(process: int) -> None:
    """At the end of the process that started them: workers go before what they use does."""
    if os.getpid() != process:
        return
    _words[_MASKS // WORD_SIZE] = 0
    _words[_STOPPING // WORD_SIZE] = 1
    library = ctypes.CDLL(None)
    for _ in _members:
        library.sem_post(ctypes.byref(_words, _SEMAPHORE))
    for member in _members:
        library.pthread_join(member, None)


@callback(types.void(*[types.intp] * 8))
def _run(entry, arguments, dimensions, steps, data, inner_dimensions, arrays, threads):
    """Does all shares of a parallel kernel, with the help of at most `threads` - 1 workers."""
    helpers = threads - 1
    job = _claim() if helpers > 0 else 0
    if job == 0:
        _call(entry, arguments, dimensions, steps, data)
        return
    atomics.store(job + _ENTRY, entry)
    atomics.store(job + _PACKED, atomics.load(arguments + WORD_SIZE))
    atomics.store(job + _SHARES, atomics.load(dimensions))
    atomics.store(job + _HELPERS, helpers)
    atomics.store(job + _NEXT, 0)
    atomics.store(job + _STATE, _OPEN)
    atomics.add(_pool() + _OPENED, 1)
    _keep_workers_off()
    _wake(helpers)
    _take_shares(job)
    atomics.add(job + _STATE, _CLAIMED - _OPEN)
    _wait_for_helpers(job)
    atomics.store(job + _STATE, 0)


@kernel
def _claim():
    """A job that is the caller's alone, or 0."""
    for number in range(JOBS):
        job = _pool() + _JOBS + number * _JOB_SIZE
        if atomics.load(job + _STATE) == 0 and atomics.replace(job + _STATE, 0, _CLAIMED):
            return job
    return 0


@kernel
def _take_shares(job):
    """Does shares of a job until none is left."""
    shares = atomics.load(job + _SHARES)
    while True:
        number = atomics.add(job + _NEXT, 1)
        if number >= shares:
            return
        _call_share(atomics.load(job + _ENTRY), number, atomics.load(job + _PACKED))


@kernel
def _wait_for_helpers(job):
    """Returns when all have left a closed job. One that lost its CPU in the middle of a share may want this one."""
    began = monotonic_ns()
    while atomics.load(job + _STATE) != _CLAIMED:
        waited = monotonic_ns() - began
        if waited < LOOK_OUT_NS:
            _pause()
        elif waited < PATIENCE_NS:
            _sched_yield()
        else:
            _usleep(LOOK_OUT_NS // 1000)


@callback(types.intp(types.intp))
def _work(unused):
    """A worker's life."""
    while atomics.load(_pool() + _STOPPING) == 0:
        opened = atomics.load(_pool() + _OPENED)
        helped = False
        for number in range(JOBS):
            helped |= _help(_pool() + _JOBS + number * _JOB_SIZE)
        if not helped:
            _wait_for_work(opened)
    return 0


@kernel
def _help(job):
    """Joins a job if it is open and wants more helpers, takes shares, leaves; says whether it did."""
    state = atomics.load(job + _STATE)
    if atomics.load(job + _NEXT) >= atomics.load(job + _SHARES):  # too late: it would only keep the caller waiting
        return False
    while state >= _OPEN and state - _OPEN < atomics.load(job + _HELPERS):
        if atomics.replace(job + _STATE, state, state + 1):
            _take_shares(job)
            atomics.add(job + _STATE, -1)
            return True
        state = atomics.load(job + _STATE)
    return False


@kernel
def _wait_for_work(opened):
    """Returns when another job than the first `opened` was opened, or a little early."""
    began, look_out, waited = monotonic_ns(), _look_out(opened), 0
    while atomics.load(_pool() + _OPENED) == opened:
        if waited >= look_out:
            _sleep(opened, began)
            return
        if waited < LOOK_OUT_NS:
            _pause()
        else:
            _sched_yield()
        before, waited = waited, monotonic_ns() - began
        if waited - before > TAKEN_NS:
            _forget_being_alone()
            look_out = 0


@kernel
def _look_out(opened):
    """How long a worker looks out for work, in nanoseconds: long where its CPU was idle, lately, while it slept.

    To wake it takes 20 to 40 us in a virtual machine, and so does whatever else finds a CPU asleep. One look-out of 16
    is short all the same, or nothing would be noted any more: one at random, lest it be always the same of a network's.
    """
    alone = 100 * atomics.load(_pool() + _USED) < ALONE * atomics.load(_pool() + _SLEPT)
    return LONG_LOOK_OUT_NS if alone and opened * _ODD >> 60 != 0 else LOOK_OUT_NS


@kernel
def _sleep(opened, began):
    """Returns when woken, or at once if there is another job than the first `opened`. The worker looks out since
    `began`.
    """
    atomics.add(_pool() + _SLEEPERS, 1)
    noted = atomics.load(_pool() + _NOTED) != 0
    asleep, used = monotonic_ns(), process_ns() if noted else 0
    if atomics.load(_pool() + _OPENED) != opened and _one_sleeper_less():
        return
    while _sem_wait(_pool() + _SEMAPHORE) != 0:  # a signal came
        pass
    if noted:
        now = monotonic_ns()
        _note(now - began, now - asleep, process_ns() - used)


@kernel
def _note(waited, slept, used):
    """Notes how long the worker waited, how long of that it slept, and the CPU time that the process used meanwhile.

    All in nanoseconds. A note weighs 7/8 of the next one. Where a long look-out is too short, as much is noted as if
    two CPUs had been busy; and never more than that: the system counts a thread's time late, by up to a few ms.
    """
    if waited > LONG_LOOK_OUT_NS:
        slept, used = LONG_LOOK_OUT_NS // 2, LONG_LOOK_OUT_NS
    used = min(used, 2 * slept)
    atomics.store(_pool() + _SLEPT, atomics.load(_pool() + _SLEPT) * 7 // 8 + slept)
    atomics.store(_pool() + _USED, atomics.load(_pool() + _USED) * 7 // 8 + used)


@kernel
def _forget_being_alone():
    """Notes for some eight times that another thread, of whatever process, wanted the worker's CPU."""
    atomics.store(_pool() + _SLEPT, 4 * LONG_LOOK_OUT_NS)
    atomics.store(_pool() + _USED, 8 * LONG_LOOK_OUT_NS)


@kernel
def _wake(count):
    """Wakes as many sleepers, if there are so many."""
    while count > 0 and _one_sleeper_less():
        _sem_post(_pool() + _SEMAPHORE)
        count -= 1


@kernel
def _one_sleeper_less():
    """Takes one off the sleepers: a waker before it wakes one, a worker that sleeps not after all. False: none left."""
    sleepers = atomics.load(_pool() + _SLEEPERS)
    while sleepers > 0:
        if atomics.replace(_pool() + _SLEEPERS, sleepers, sleepers - 1):
            return True
        sleepers = atomics.load(_pool() + _SLEEPERS)
    return False


@kernel
def _keep_workers_off():
    """Keeps the workers off the CPU that the caller runs on, where it has moved: two system calls for each."""
    masks, kept_off = atomics.load(_pool() + _MASKS), atomics.load(_pool() + _KEPT_OFF)
    if masks == 0:
        return
    cpu = _sched_getcpu()
    if cpu == kept_off or not 0 <= cpu < _CPUS or not atomics.replace(_pool() + _MOVING, 0, 1):
        return
    for i in range(MOST_KEPT_OFF):
        thread = atomics.load(_pool() + _THREADS + i * WORD_SIZE)
        if thread != 0:
            if not _runs_where(thread, masks + kept_off * CPU_SET_SIZE):
                atomics.store(_pool() + _MASKS, 0)
                break
            _setaffinity(thread, CPU_SET_SIZE, masks + cpu * CPU_SET_SIZE)
    atomics.store(_pool() + _KEPT_OFF, cpu)
    atomics.store(_pool() + _MOVING, 0)


@kernel
def _runs_where(thread, mask):
    """Whether a worker may still run where it was told to. If not, somebody else said where, and knows better."""
    _getaffinity(thread, CPU_SET_SIZE, _pool() + _FOUND)
    for offset in range(0, CPU_SET_SIZE, WORD_SIZE):
        if atomics.load(_pool() + _FOUND + offset) != atomics.load(mask + offset):
            return False
    return True


@intrinsic
def _call(typing_context, entry, arguments, dimensions, steps, data):
    """Calls the function at `entry` with the other four."""

    def codegen(context, builder, signature, values):
        _emit_call(builder, *values)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def _call_share(typing_context, entry, number, packed):
    """Calls the function at `entry` for one share, as NumPy calls the inner loop of a generalised ufunc."""

    def codegen(context, builder, signature, values):
        entry, number, packed = values
        arguments, dimensions, steps = (_emit_words(builder, words) for words in ((number, packed), (WORD(1),), ()))
        _emit_call(builder, entry, arguments, dimensions, steps, WORD(0))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


def _emit_call(builder, entry, *arguments):
    function_type = ir.FunctionType(ir.VoidType(), [WORD] * len(arguments))
    builder.call(builder.inttoptr(entry, function_type.as_pointer()), arguments)


def _emit_words(builder, words):
    """The address of words on the stack."""
    if not words:
        return WORD(0)
    array = cgutils.alloca_once(builder, WORD, size=WORD(len(words)))
    for i, word in enumerate(words):
        builder.store(word, builder.gep(array, [WORD(i)]))
    return builder.ptrtoint(array, WORD)


@intrinsic
def _pause(typing_context):
    """Tells the processor that this loop waits."""

    def codegen(context, builder, signature, arguments):
        name, operands = _PAUSES[platform.machine()]
        declared = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, declared, name), operands)
        return context.get_dummy_value()

    return types.void(), codegen
