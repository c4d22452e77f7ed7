"""The package's own threads: where they run, how many help, and how they begin and end."""

from __future__ import annotations

import os
import textwrap

import pytest

from fastsepconv.kernels.cpu import quota, workers
from tests.kernels.thread_scripts import output

OWN_POOL = pytest.mark.skipif(not workers.available(), reason="the package's own pool is for Linux")


WORKERS = """
    def others():
        return [int(task) for task in os.listdir("/proc/self/task") if int(task) != threading.get_native_id()]

    before = set(others())
    right()
    workers = [task for task in others() if task not in before]
    allowed = os.sched_getaffinity(0)
    where = lambda: {frozenset(os.sched_getaffinity(task)) for task in workers}
"""
A_THREAD_A_CPU = {"NUMBA_NUM_THREADS": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)}


@OWN_POOL
def test_workers_keep_off_their_callers_cpu(tmp_path):
    code = """
        for cpu in sorted(allowed)[:2]:
            os.sched_setaffinity(0, {cpu})
            right()
            kept_off = 1 < len(allowed) and len(workers) <= threads.workers.MOST_KEPT_OFF
            print(where() == ({frozenset(allowed - {cpu})} if kept_off else {frozenset(allowed)} if workers else set()))
    """
    found = output(textwrap.dedent(WORKERS) + textwrap.dedent(code), tmp_path, **A_THREAD_A_CPU)
    assert set(found.splitlines()) == {"True"}


@OWN_POOL
@pytest.mark.parametrize("count", [{"NUMBA_NUM_THREADS": "4"}, A_THREAD_A_CPU])
def test_workers_stay_where_somebody_else_put_them(tmp_path, count):
    code = """
        first = sorted(allowed)[0]
        for task in workers:
            os.sched_setaffinity(task, {first})
        for cpu in sorted(allowed)[:3] * 2:
            os.sched_setaffinity(0, {cpu})
            assert right()
        print(where() <= {frozenset({first})})
    """
    assert output(textwrap.dedent(WORKERS) + textwrap.dedent(code), tmp_path, **count) == "True"


@OWN_POOL
def test_a_start_that_was_interrupted_goes_on(tmp_path):
    code = """
        threads.workers.start(1)
        print(threads._cells[threads.RUN], right(), len(threads.workers._members))
    """
    assert output(code, tmp_path) == "0 True 3"


@OWN_POOL
def test_more_callers_than_the_pool_has_jobs(tmp_path):
    code = """
        outcomes = []
        work = lambda: outcomes.extend(right() for _ in range(40))
        callers = [threading.Thread(target=work) for _ in range(2 * threads.workers.JOBS)]
        [c.start() for c in callers]
        [c.join() for c in callers]
        print(len(outcomes) == 40 * len(callers), all(outcomes))
    """
    assert output(code, tmp_path) == "True True"


@OWN_POOL
def test_no_more_workers_help_than_were_asked_for(tmp_path):
    code = """
        import time
        from fastsepconv.kernels.cpu import atomics
        from fastsepconv.kernels.cpu.clock import monotonic_ns

        @parallel_kernel
        def _meet(dtype, worker, workers, meeting, most):
            present = atomics.add(meeting, 1) + 1
            seen = atomics.load(most)
            while present > seen and not atomics.replace(most, seen, present):
                seen = atomics.load(most)
            until = monotonic_ns() + 20_000_000
            while monotonic_ns() < until:
                pass
            atomics.add(meeting, -1)

        @jit.kernel
        def meet(dtype, meeting, most):
            _meet(dtype, 12, meeting, most)

        for count in (1, 2, 3, 4):
            threads.set_num_threads(count)
            words = np.zeros(2, np.int64)
            meet(np.float64, words.ctypes.data, words.ctypes.data + 8)
            print(words[1] == count)
    """
    assert output(code, tmp_path) == "True\n" * 3 + "True"


@OWN_POOL
@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"])
def test_the_process_ends_while_another_thread_computes(tmp_path, end):
    code = f"""
        import time
        threading.Thread(target=lambda: [right(1 << 20) for _ in range(10**6)], daemon=True).start()
        right()
        time.sleep(0.2)
        print("done", flush=True)
        {end}
    """
    for _ in range(3):
        assert output(code, tmp_path) == "done"


@OWN_POOL
def test_a_worker_looks_out_for_longer_where_its_cpu_is_idle(tmp_path):
    code = """
        w = threads.workers  # not started: nobody else takes notes

        def long(waited, slept, used, times=8):
            for _ in range(times):
                w._note(waited, slept, used)
            return sum(w._look_out(opened) == w.LONG_LOOK_OUT_NS for opened in range(1600))

        print(long(0, 0, 0) == 0)                                # nothing is known
        print(1450 < long(200_000, 150_000, 140_000) < 1550)     # one thread, from call to call; one of 16 is short
        print(long(200_000, 150_000, 700_000, 1) > 0)            # a thread's time that was counted late
        print(long(200_000, 150_000, 230_000) == 0)              # a network's other operations
        print(long(200_000, 150_000, 140_000, 20) > 0)
        print(long(800_000, 300_000, 100_000) == 0)              # too late for a long look-out
        print(long(200_000, 150_000, 140_000, 20) > 0)
        w._forget_being_alone()
        print(long(200_000, 150_000, 20_000, 1) == 0)
    """
    assert output(code, tmp_path) == "\n".join(["True"] * 8)


@OWN_POOL
@pytest.mark.parametrize("count", [2, 3])
def test_notes_are_taken_where_there_is_one_worker(tmp_path, count):
    code = """
        import time
        w = threads.workers
        def wait_between_calls(seconds):
            for _ in range(20):
                right()
                time.sleep(seconds)
            return w._words[w._SLEPT // 8]

        print(wait_between_calls(0.002) > 0)
        print(w._words[w._USED // 8] >= 1.5 * w._words[w._SLEPT // 8])  # a long look-out would be too short
    """
    noted = count == 2 and quota.cpus() is None
    assert output(code, tmp_path, NUMBA_NUM_THREADS=str(count)) == ("True\nTrue" if noted else "False\nTrue")


@OWN_POOL
def test_a_worker_notices_who_wants_its_cpu(tmp_path):
    """The caller, the worker and another process on one CPU: the worker that looks out goes without it for a while."""
    code = """
        import subprocess, sys, time
        w = threads.workers
        right()
        w._words[w._SLEPT // 8], w._words[w._USED // 8] = 10**9, 0  # all look-outs are long but for one of 16
        cpu = {min(os.sched_getaffinity(0))}
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), cpu)
        burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            until = time.monotonic() + 20
            while w._words[w._USED // 8] == 0 and time.monotonic() < until:
                right()
        finally:
            burn.kill()
        print(w._words[w._USED // 8] > 0)
    """
    assert output(code, tmp_path, NUMBA_NUM_THREADS="2") == "True"
