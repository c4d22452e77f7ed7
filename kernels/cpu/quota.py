"""The CPU time that Linux grants a process, where a group of processes has a quota: so are containers limited.

A group (cgroup) may use so many microseconds of CPU time each period: three CPUs' worth, say, however many there are.
A group inside another is held to that one's quota as well. The first version of such groups and the second tell of it
in files of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

# By the controller in /proc/self/cgroup, which is empty in version 2: where its groups are, and their files.
_GROUPS = {
    "": ("sys/fs/cgroup", ("cpu.max",)),
    "cpu": ("sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
}


def cpus(root: Path = Path("/")) -> float | None:
    """As many CPUs as this process may keep busy all the time, 1.5 say, or None where no quota says so."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in _GROUPS.keys() & controllers.split(","):
                yield from _quotas_of_group(root, controller, path.strip("/").split("/"))


def _quotas_of_group(root: Path, controller: str, path: list[str]) -> Iterator[float]:
    """Of a group and of those around it; a container may see its own in the place of the outermost."""
    folder, names = _GROUPS[controller]
    for depth in range(len(path) + 1):
        group = root.joinpath(folder, *path[:depth])
        with contextlib.suppress(OSError, ValueError):  # a file is not there; "max" stands for no quota
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            if quota > 0:  # -1 stands for none
                yield quota / period
