"""Medians, spreads and ratios."""

from __future__ import annotations

import pytest

from fastsepconv.bench import stats


def test_summary_is_over_all_calls_of_all_blocks():
    assert stats.summary([[1.0, 2.0], [3.0], [4.0, 100.0]]) == {"median": 3.0, "q25": 2.0, "q75": 4.0, "calls": 5}


def test_a_single_call_is_its_own_quartiles():
    assert stats.summary([[7.0]]) == {"median": 7.0, "q25": 7.0, "q75": 7.0, "calls": 1}


def test_ratio_is_theirs_over_ours():
    found = stats.ratio(ours=[[1.0, 1.0], [1.0]], theirs=[[2.0], [3.0, 3.0, 3.0]])
    assert found == {"ratio": 3.0, "q25": 2.25, "q75": 2.75}


def test_a_provider_against_its_own_times_gives_1():
    rounds = [[0.3, 0.1], [0.2]]
    assert stats.ratio(rounds, rounds) == {"ratio": 1.0, "q25": 1.0, "q75": 1.0}


def test_one_slow_call_does_not_move_a_ratio():
    steady = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert stats.ratio(steady, [[1.0, 1.0, 50.0], [1.0, 1.0, 1.0]])["ratio"] == 1.0


def test_geometric_mean_of_a_win_and_the_same_loss_is_1():
    assert stats.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
