"""Which code was measured: told in a checkout, and never the reason that a run fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fastsepconv.bench import revision


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with one commit of two files."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "code.py").write_text("x = 1\n")
    (tmp_path / "results.json").write_text("{}\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--no-gpg-sign", "-m", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_whether_code_was_changed(checkout):
    code = checkout / "package" / "code.py"
    commit = git(checkout, "rev-parse", "HEAD")
    assert revision.describe(code) == {"commit": commit, "changed": False}
    (checkout / "results.json").write_text("{1}\n")
    assert revision.describe(code) == {"commit": commit, "changed": False}
    code.write_text("x = 2\n")
    assert revision.describe(code) == {"commit": commit, "changed": True}
    assert revision.short(revision.describe(code)) == f"{commit[:7]} with changes"


def test_what_only_lies_in_the_checkout_of_another_project_is_not_of_its_commit(checkout):
    installed = checkout / "site-packages" / "code.py"
    installed.parent.mkdir()
    installed.write_text("x = 1\n")
    assert revision.describe(installed) is None


def test_without_git_or_a_checkout_there_is_none(checkout, tmp_path_factory, monkeypatch):
    alone = tmp_path_factory.mktemp("alone") / "code.py"
    alone.write_text("x = 1\n")
    assert revision.describe(alone) is None
    monkeypatch.setenv("PATH", "")
    assert revision.describe(checkout / "package" / "code.py") is None
    assert revision.short(None) == ""
