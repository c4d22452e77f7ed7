"""Which backend is picked, and what is said about it."""

from __future__ import annotations

import numpy as np
import pytest

import fastsepconv
from fastsepconv import dispatch, formulas
from fastsepconv.kernels import cpu, nvidia


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    yield
    dispatch._kernels.cache_clear()
    dispatch._obstacle.cache_clear()


def test_auto_is_the_default_and_picks_the_cpu():
    assert fastsepconv.get_backend() == "auto"
    assert dispatch.kernels() is cpu
    assert str(dispatch.explain()) == "cpu, since it is the first of cpu, reference that can run here."


@pytest.mark.parametrize("name, module", [("cpu", cpu), ("reference", formulas), ("auto", cpu)])
def test_a_backend_can_be_set_for_the_process_or_for_a_call(name, module):
    assert dispatch.kernels(name) is module
    fastsepconv.set_backend(name)
    assert fastsepconv.get_backend() == name
    assert dispatch.kernels() is module


def test_the_backend_of_a_call_goes_before_the_one_that_was_set(monkeypatch):
    used = []
    monkeypatch.setattr(formulas, "pointwise_forward", lambda *arguments: used.append("reference"))
    monkeypatch.setattr(cpu, "pointwise_forward", lambda *arguments: used.append("cpu"))
    x, kernel = np.ones((1, 1, 1, 1)), np.ones((1, 1))
    fastsepconv.set_backend("reference")
    fastsepconv.pointwise_conv2d(x, kernel)
    fastsepconv.pointwise_conv2d(x, kernel, backend="cpu")
    fastsepconv.pointwise_conv2d(x, kernel, backend="auto")
    assert used == ["reference", "cpu", "cpu"]


def test_the_environment_is_the_default_and_is_checked(monkeypatch):
    monkeypatch.setenv("FASTSEPCONV_BACKEND", "reference")
    assert fastsepconv.get_backend() == "reference"
    assert dispatch.kernels() is formulas
    fastsepconv.set_backend("cpu")
    assert dispatch.kernels() is cpu
    monkeypatch.setattr(dispatch, "_chosen", None)
    monkeypatch.setenv("FASTSEPCONV_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"argument `FASTSEPCONV_BACKEND`\. Expected.*FASTSEPCONV_BACKEND='gpu'"):
        fastsepconv.pointwise_conv2d(np.ones((1, 1, 1, 1)), np.ones((1, 1)))


@pytest.mark.parametrize("name", ["gpu", "CPU", "", None, 0, ("cpu",)])
def test_unknown_backends_are_refused_and_change_nothing(name):
    with pytest.raises(ValueError, match=r"argument `backend`\. Expected one of 'auto', 'cpu', 'cuda'"):
        fastsepconv.set_backend(name)
    assert fastsepconv.get_backend() == "auto"


@pytest.mark.skipif("cuda" in dispatch.runnable(), reason="there is CUDA here")
def test_asking_for_cuda_says_what_is_missing():
    for ask in (fastsepconv.set_backend, dispatch.kernels, dispatch.explain):
        with pytest.raises(ValueError, match="Invalid value for argument `backend`") as caught:
            ask("cuda")
        message = str(caught.value)
        assert "one that can run here, 'auto' or 'cpu' or 'reference'" in message
        assert nvidia.obstacle() in message
    assert fastsepconv.get_backend() == "auto"


def test_without_the_cpu_kernels_auto_warns_and_runs_the_formulas(monkeypatch):
    broken = dispatch.BACKENDS[0]._replace(obstacle=lambda: "the Numba kernels cannot be loaded (no LLVM)")
    monkeypatch.setattr(dispatch, "BACKENDS", (broken, *dispatch.BACKENDS[1:]))
    dispatch._kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow backend reference, since .* cpu: the Numba kernels cannot be loaded"):
        assert dispatch.kernels() is formulas
    assert list(dispatch.explain().obstacles) == ["cpu"]
    with pytest.raises(ValueError, match="no LLVM"):
        fastsepconv.set_backend("cpu")


def test_the_number_of_threads_is_the_kernels_own(rng):
    from fastsepconv.kernels.cpu import threads

    before = threads.get_num_threads()
    x, kernel = rng.normal(size=(4, 9, 9, 33)), rng.normal(size=(33, 17))
    try:
        results = []
        for count in (1, 2):
            fastsepconv.set_num_threads(count)
            assert threads.get_num_threads() == count
            results.append(fastsepconv.pointwise_conv2d(x, kernel, backend="cpu"))
        np.testing.assert_array_equal(*results)
    finally:
        fastsepconv.set_num_threads(before)
