"""The thread pool: which one is taken, how many threads, and what a forked child may do.

The pool is settled once a process, so each case runs in a process of its own.
"""

from __future__ import annotations

import re

import pytest

from fastsepconv.kernels.cpu import threads, workers
from tests.kernels.thread_scripts import HAS_TBB, LAYERS, NUMBA_LAYERS, on, output, run


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
