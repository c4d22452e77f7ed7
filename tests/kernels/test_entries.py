"""Kernels that Python calls find out their arguments' types once for each type of the first."""

from __future__ import annotations

from fastsepconv.kernels.cpu.jit import entry


@entry
def scaled(value, count):
    """value * count."""
    return value * count


def test_types_are_found_out_once(monkeypatch):
    asked, typeof = [], scaled.typeof_pyval
    monkeypatch.setattr(scaled, "typeof_pyval", lambda value: asked.append(value) or typeof(value))
    results = [scaled(3, 2), scaled(4, 5), scaled(1.5, 2), scaled(2.5, 4)]
    assert results == [6, 20, 3.0, 10.0]
    assert [type(result) for result in results] == [int, int, float, float]
    assert asked == [3, 2, 1.5, 2]
