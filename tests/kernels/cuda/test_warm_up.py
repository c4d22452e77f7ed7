"""What `make test-cuda` does before its tests: every kernel is compiled, on several cores, and kept on the disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

HOPPER = (9, 0)


@pytest.fixture
def warm_up(toolkit):
    from tests.kernels.cuda import warm_up

    return warm_up


def test_every_kernel_of_both_tables_is_compiled(warm_up):
    from tests.kernels.cuda import assembly, fast_assembly

    fast = json.loads(fast_assembly.TABLE.read_text())["kernels"]
    names = [kernel.name for kernel in warm_up.kernels(HOPPER)]
    assert sorted(names) == sorted([*json.loads(assembly.TABLE.read_text()), *fast])
    others = [name for name in names if "warpgroups" not in name and not name.startswith("transpose")]
    assert [kernel.name for kernel in warm_up.kernels((8, 0))] == others


def test_processes_share_the_work_and_keep_it_for_who_asks_next(double, warm_up, monkeypatch, capsys):
    from fastsepconv.kernels.cuda import binaries

    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # where the processes find this package of tests
    few = [place for place, kernel in enumerate(warm_up.kernels(HOPPER)) if kernel.tier == "plain"][:3]
    assert warm_up.compile_all(few, HOPPER, 2) == warm_up.OK
    assert re.match(r"3 of 3 kernels are compiled, after \d+ s\.", capsys.readouterr().out)
    before = dict(binaries.counts)
    for place in few:
        binaries.get(warm_up.kernels(HOPPER)[place], HOPPER)
    assert binaries.counts == {**before, "loaded": before["loaded"] + 3}


def test_what_a_launch_costs_the_host_is_measured(double, warm_up):
    """Here without the driver's share: what is packed, checked and called in Python."""
    assert 0 < warm_up.host_microseconds(5, 10) < 1000
    assert len(double.launches) == 51 and not double.memory and double.current == 0


def test_what_does_not_compile_is_named(double, warm_up, monkeypatch):
    from fastsepconv.kernels.cuda import binaries

    monkeypatch.setattr(binaries, "get", lambda *arguments: 1 / 0)
    assert re.match(r"\w+\[.*\] does not compile: ZeroDivisionError", warm_up.compiled((0, HOPPER)))


def test_the_first_call_is_checked(warm_up, monkeypatch):
    import fastsepconv

    right = fastsepconv.pointwise_conv2d
    monkeypatch.setattr(
        fastsepconv, "pointwise_conv2d", lambda x, kernel, backend: right(x, kernel, backend="reference")
    )
    assert warm_up.first_call() == 0
    monkeypatch.setattr(
        fastsepconv, "pointwise_conv2d",
        lambda x, kernel, backend: right(x, kernel, backend="reference") * (1 + (backend == "cuda")),
    )  # fmt: skip
    with pytest.raises(ArithmeticError, match="a product is off by"):
        warm_up.first_call()
