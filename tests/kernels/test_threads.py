"""The thread pool: which one is taken, how many threads, and what a forked child may do.

The pool is settled once a process, so each case runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap

import pytest

from fastsepconv.kernels.cpu import threads, workers

HAS_TBB = importlib.util.find_spec("numba.np.ufunc.tbbpool") is not None and sys.platform == "linux"
NOISE = "Unable to join threads to shut down before fork()"  # Numba's TBB layer says it on stdout
NUMBA_LAYERS = ["tbb", "omp", "workqueue"]
LAYERS = [*(["own"] if workers.available() else []), *NUMBA_LAYERS]
KERNEL = """
    import numba, numpy as np, os, sys, threading
    from numba import types
    from fastsepconv.kernels.cpu import jit, threads
    from fastsepconv.kernels.cpu.memory import view
    from fastsepconv.kernels.cpu.pool import parallel_kernel

    @parallel_kernel
    def _double(dtype, worker, workers, length, x, y):
        source, target = view(dtype, x, length), view(dtype, y, length)
        for i in range(worker, length, workers):
            target[i] = 2 * source[i]

    @jit.kernel
    def double(dtype, workers, length, x, y):
        _double(dtype, workers, length, x, y)

    def right(length=4096):
        x = np.arange(float(length))
        y = np.full(length, np.nan)
        double(np.float64, threads.get_num_threads(), length, x.ctypes.data, y.ctypes.data)
        return np.array_equal(y, 2 * x)
"""
FORK = """
    import signal

    def outcome_of_child(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that hangs dies of it
            code = 3
            try:
                code = work()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def on(layer: str) -> dict[str, str]:
    """The environment in which that pool is taken: the package's own unless the user wants another."""
    return {} if layer == "own" else {"NUMBA_THREADING_LAYER": layer}


def run(code: str, tmp_path, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` after the kernel `double`, as a file in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text("".join(textwrap.dedent(part) for part in (KERNEL, FORK, code)))
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "OMP_", "GOMP_", "KMP_", "FASTSEPCONV_"))
    }
    settings = {
        **kept,
        "OPENBLAS_NUM_THREADS": "1",
        "FASTSEPCONV_CACHE_DIR": str(tmp_path / "cache"),
        "NUMBA_NUM_THREADS": "4",
        **environment,
    }
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)


def output(code: str, tmp_path, **environment: str) -> str:
    """What `code` prints; it must end well and warn of nothing."""
    result = run(code, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return "\n".join(line for line in result.stdout.splitlines() if line and not line.startswith(NOISE))


@pytest.mark.skipif(not workers.available(), reason="the package's own pool is for Linux")
def test_the_own_pool_is_taken_first(tmp_path):
    code = """
        print(threads.layer(), right(), threads.layer(), len(threads.workers._members), threading.active_count())
        print("numba.np.ufunc.tbbpool" in sys.modules)
    """
    assert output(code, tmp_path) == "own True own 3 1\nFalse"


@pytest.mark.skipif(not HAS_TBB, reason="this platform has no TBB from pip")
def test_tbb_of_the_environment_is_found_and_taken_next(tmp_path):
    code = """
        threads.workers.available = lambda: False
        print(threads.layer(), right(), numba.threading_layer())
    """
    assert output(code, tmp_path) == "tbb True tbb"


@pytest.mark.parametrize("layer", NUMBA_LAYERS)
def test_the_users_own_choice_is_followed(tmp_path, layer):
    code = "print(threads.layer(), right(), numba.threading_layer())"
    assert output(code, tmp_path, NUMBA_THREADING_LAYER=layer) == f"{layer} True {layer}"


def test_the_users_own_order_is_followed(tmp_path):
    order = "workqueue omp tbb"
    assert output("print(threads.layer())", tmp_path, NUMBA_THREADING_LAYER_PRIORITY=order) == "workqueue"


@pytest.mark.parametrize("missing", [["tbb"], ["tbb", "omp"]])
def test_the_next_layer_is_taken_where_one_cannot_be_loaded(tmp_path, missing):
    code = f"""
        threads.workers.available = lambda: False
        sys.modules.update({{f"numba.np.ufunc.{{name}}pool": None for name in {missing}}})
        threads._available_layer.cache_clear()
        print(threads.layer())
    """
    assert output(code, tmp_path) == ("workqueue" if "omp" in missing else "omp")


def test_a_layer_asked_for_that_cannot_be_loaded_is_told(tmp_path):
    code = """
        sys.modules["numba.np.ufunc.tbbpool"] = None
        threads._available_layer.cache_clear()
        for ask in (threads.layer, threads.ensure_started):
            try:
                ask()
            except RuntimeError as error:
                print("NUMBA_THREADING_LAYER" in str(error))
    """
    assert output(code, tmp_path, NUMBA_THREADING_LAYER="threadsafe" if not HAS_TBB else "safe") == "True\nTrue"


@pytest.mark.parametrize("layer", [layer for layer in ("own", "omp") if layer in LAYERS])
def test_idle_threads_sleep(tmp_path, layer):
    code = """
        import time
        right()
        before = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - before < 0.1, "OMP_WAIT_POLICY" in os.environ)
    """
    assert output(code, tmp_path, **on(layer)) == "True False"


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


def test_what_shares_call_by_address_is_compiled_before_they_run(tmp_path):
    """Within a share it would be too late to raise."""
    code = """
        import fastsepconv
        from fastsepconv.kernels.cpu import pool

        inner = [name for name, (*_, function, _) in pool._functions.items() if "_multiply_panel" in function.__name__]
        for name in inner:
            cell, _, *rest = pool._functions[name]
            pool._functions[name] = (cell, type("Broken", (), {"address": property(lambda self: 1 / 0)})(), *rest)
        try:
            x, depthwise_kernel, pointwise_kernel = np.ones((1, 9, 9, 8)), np.ones((3, 3, 8, 1)), np.ones((8, 8))
            fastsepconv.separable_conv2d(x, depthwise_kernel, pointwise_kernel)
        except RuntimeError as error:
            print("could not be compiled" in str(error))
    """
    assert output(code, tmp_path) == "True"


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
        from fastsepconv.kernels.cpu.workers import _monotonic_ns

        @parallel_kernel
        def _meet(dtype, worker, workers, meeting, most):
            present = atomics.add(meeting, 1) + 1
            seen = atomics.load(most)
            while present > seen and not atomics.replace(most, seen, present):
                seen = atomics.load(most)
            until = _monotonic_ns() + 20_000_000
            while _monotonic_ns() < until:
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


@pytest.mark.parametrize("layer", LAYERS)
def test_many_threads_may_call_at_once(tmp_path, layer):
    code = """
        outcomes = []
        callers = [threading.Thread(target=lambda: outcomes.extend(right() for _ in range(50))) for _ in range(4)]
        [c.start() for c in callers]
        [c.join() for c in callers]
        print(len(outcomes), all(outcomes))
    """
    assert output(code, tmp_path, **on(layer)) == "200 True"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forked_child_computes(tmp_path, layer):
    code = """
        print(right())
        print(outcome_of_child(lambda: 0 if right() and outcome_of_child(lambda: 0 if right() else 1) == 0 else 1))
        print(right())
    """
    assert output(code, tmp_path, **on(layer)) == "True\n0\nTrue"


def test_a_child_forked_after_openmp_was_started_by_others_computes(tmp_path):
    code = """
        import numba

        @numba.njit(parallel=True)
        def others(x):
            for i in numba.prange(x.size):
                x[i] = i

        others(np.zeros(8))
        print(numba.threading_layer(), outcome_of_child(lambda: 0 if right() else 1))
    """
    assert output(code, tmp_path, NUMBA_THREADING_LAYER="omp") == "omp 0"


def test_a_child_forked_before_openmp_started_computes(tmp_path):
    code = "print(threads.layer(), outcome_of_child(lambda: 0 if right() else 1))"
    assert output(code, tmp_path, NUMBA_THREADING_LAYER="omp") == "omp 0"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_child_forked_while_others_compute_and_compile(tmp_path, layer):
    code = """
        stop = threading.Event()

        def compute():
            while not stop.is_set():
                right()

        def compile_anew():
            while not stop.is_set():
                jit.kernel(lambda x: x + 1)(1)

        print(right())
        others = [threading.Thread(target=compute), threading.Thread(target=compile_anew)]
        [o.start() for o in others]
        work = lambda: 0 if right() and jit.kernel(lambda x: x + 2)(1) == 3 else 1
        outcomes = [outcome_of_child(work) for _ in range(8)]
        stop.set()
        [o.join() for o in others]
        print(outcomes)
    """
    assert output(code, tmp_path, **on(layer)) == f"True\n{[0] * 8}"


def test_the_count_is_one_for_all_threads_and_for_compiled_code(tmp_path):
    code = """
        seen = []
        ask = jit.kernel(lambda: threads.current())

        def look():
            seen.append((threads.get_num_threads(), ask()))

        look()
        threads.set_num_threads(3)
        for place in (threading.Thread(target=look), threading.Thread(target=look)):
            place.start()
            place.join()
        print(seen)
    """
    assert output(code, tmp_path) == "[(4, 4), (3, 3), (3, 3)]"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_cached_callback_runs_on_the_pool_in_a_second_process(tmp_path, layer):
    code = """
        @jit.callback(types.intp(types.intp))
        def ask(unused):
            x, y = np.ones(8), np.zeros(8)
            double(np.float64, threads.current(), 8, x.ctypes.data, y.ctypes.data)
            return 2 * threads.current() + int(y.sum())

        threads.ensure_started()
        answers = []
        caller = threading.Thread(target=lambda: answers.append(ask.ctypes(0)))
        caller.start()
        caller.join()
        threads.set_num_threads(3)
        print(*answers, ask.ctypes(0), jit.state()["compiled"] > 0)
    """
    assert output(code, tmp_path, **on(layer)) == "24 22 True"
    assert output(code, tmp_path, **on(layer)) == "24 22 False"


def test_the_environment_sets_the_count(tmp_path):
    assert output("print(threads.get_num_threads())", tmp_path, FASTSEPCONV_NUM_THREADS="2") == "2"


@pytest.mark.parametrize("value", ["0", "-1", "5", "two", "1.5"])
def test_a_wrong_count_in_the_environment_is_told(tmp_path, value):
    result = run("threads.get_num_threads()", tmp_path, FASTSEPCONV_NUM_THREADS=value)
    assert result.returncode == 1
    sentence = (
        rf"ValueError: Invalid value for environment variable `FASTSEPCONV_NUM_THREADS`\. Expected .* 1 to 4, .*{value}"
    )
    assert re.search(sentence, result.stderr), result.stderr


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (10**6, ValueError)])
@pytest.mark.parametrize("kind", [int, "numpy"])
def test_a_count_out_of_range_is_refused(value, error, kind):
    import numpy as np

    before = threads.get_num_threads()
    with pytest.raises(error, match="Invalid value for argument `num_threads`"):
        threads.set_num_threads(value if kind is int else np.int64(value))
    assert threads.get_num_threads() == before


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_a_count_that_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="Invalid value for argument `num_threads`"):
        threads.set_num_threads(value)
