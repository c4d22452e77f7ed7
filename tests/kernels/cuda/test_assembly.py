"""Every plain kernel compiles for every capability and is assembled: as much as can be known of it without a card."""

from __future__ import annotations

import json

import pytest

MORE_REGISTERS = 4  # between two versions of the toolkit; beyond that the table is to be rewritten, and looked at


@pytest.fixture(scope="module")
def assembled(request):
    from fastsepconv.kernels import nvidia

    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install 'fastsepconv[cuda13]'")
    if nvidia.is_simulated():
        pytest.skip("NUMBA_ENABLE_CUDASIM=1 puts the simulator in the compiler's place")
    from . import assembly

    if assembly.assembler() is None:
        pytest.skip("ptxas is not installed: pip install --group test")
    return assembly.table(), json.loads(assembly.TABLE.read_text())


def test_every_kernel_is_in_the_table_and_no_other(assembled):
    found, committed = assembled
    assert found.keys() == committed.keys()
    assert all(found[name].keys() == committed[name].keys() for name in found)


def test_kernels_take_no_more_of_a_multiprocessor_than_they_did(assembled):
    found, committed = assembled
    for name, by_capability in found.items():
        for capability, ours in by_capability.items():
            theirs = committed[name][capability]
            assert ours["registers"] <= theirs["registers"] + MORE_REGISTERS, (name, capability)
            assert ours["shared"] == theirs["shared"], (name, capability)


def test_nothing_is_spilled_and_singles_are_not_computed_in_double(assembled):
    found, _ = assembled
    for name, by_capability in found.items():
        for capability, ours in by_capability.items():
            assert ours["spilled"] == 0, (name, capability)
            assert (ours["double"] > 0) == ("float64" in name), (name, capability)
