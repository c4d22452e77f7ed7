"""Which state of the code was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path


def describe(file: Path = Path(__file__)) -> dict | None:
    """The commit that `file` is of, and whether Python files have been changed since; None where git cannot tell."""
    folder, name = file.resolve().parent, file.resolve().name

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", name)  # an installed package may lie in the checkout of another project
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def short(described: dict | None) -> str:
    """For people: seven digits, and whether there were changes; empty where nothing is known."""
    if described is None:
        return ""
    return described["commit"][:7] + (" with changes" if described["changed"] else "")
