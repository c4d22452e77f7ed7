"""What a quota of CPU time leaves of the CPUs, from files as Linux writes them, and what the kernels make of it."""

from __future__ import annotations

import math

import numba
import pytest

from fastsepconv.kernels.cpu import quota, threads

V1 = "7:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n"
MACHINES = {
    "version 2, in a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "version 2, without a quota": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "version 2, not in a container": ("0::/\n", {}, None),
    "version 2, a group inside another": (
        "0::/a.slice/b.scope\n",
        {"a.slice/cpu.max": "50000 20000\n", "a.slice/b.scope/cpu.max": "max 100000\n"},
        2.5,
    ),
    "version 2, the inner quota is the smaller": (
        "0::/a.slice/b.scope\n",
        {"a.slice/cpu.max": "400000 100000\n", "a.slice/b.scope/cpu.max": "50000 100000\n"},
        0.5,
    ),
    "version 1, in a container": (V1, {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    "version 1, without a quota": (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    "version 1, seen from outside": (
        V1,
        {"cpu/docker/ab/cpu.cfs_quota_us": "200000\n", "cpu/docker/ab/cpu.cfs_period_us": "100000\n"},
        2.0,
    ),
    "files of another kind": ("0::/\n", {"cpu.max": "plenty\n"}, None),
    "no such files at all": (None, {}, None),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_quota_is_read_where_there_is_one(tmp_path, machine):
    groups, files, wanted = MACHINES[machine]
    if groups is not None:
        files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": groups}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota.cpus(tmp_path) == wanted


def test_the_quota_of_this_machine_can_be_asked_for():
    found = quota.cpus()
    assert found is None or 0 < found < math.inf


@pytest.mark.parametrize(("limit", "count"), [(None, 8), (0.5, 1), (1.0, 1), (1.5, 2), (6.0, 6), (64.0, 8)])
def test_no_more_threads_are_used_than_the_quota_keeps_busy(monkeypatch, limit, count):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setattr(quota, "cpus", lambda: limit)
    for variable in (threads.NUM_THREADS_VARIABLE, "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    assert threads._default_num_threads() == count


@pytest.mark.parametrize("variable", [threads.NUM_THREADS_VARIABLE, "NUMBA_NUM_THREADS"])
def test_a_count_that_the_user_set_stands(monkeypatch, variable):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setattr(quota, "cpus", lambda: 2.0)
    for name in (threads.NUM_THREADS_VARIABLE, "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "8")
    assert threads._default_num_threads() == 8
