"""`make test-cuda` and `make bench-cuda` on a machine where nothing is installed or can be."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsepconv.kernels import nvidia

from . import conftest

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^pytestmark = pytest\.mark\.cuda", re.MULTILINE)
SCRIPT = ROOT / "scripts" / "on_card.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("on_card", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, **settings):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, check=False, **settings
    )


def test_the_package_is_imported_as_it_would_be_installed(tmp_path):
    code = """
import fastsepconv, fastsepconv.bench.problems, fastsepconv.kernels.geometry, tests.goldens, sys
for module in (fastsepconv, fastsepconv.bench, fastsepconv.kernels, tests.goldens):
    print(module.__name__, module.__file__)
print("kernels" in sys.modules, "" in sys.path)
"""
    done = run("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *modules, last = done.stdout.splitlines()
    assert all(str(ROOT / "build" / "on-card") in line for line in modules), done.stdout
    assert len(modules) == 4 and last == "False False"


def test_wheels_that_travel_along_are_unpacked(script, monkeypatch, tmp_path):
    for folder in ("fastsepconv", "kernels", "bench", "tests", "wheels"):
        (tmp_path / folder).mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    tree = script.lay_out(tmp_path / "tree")
    assert (tree / "some" / "__init__.py").exists()
    assert (tree / "fastsepconv" / "kernels").resolve() == tmp_path / "kernels"
    assert script.lay_out(tree) == tree, "and once more over what is there"


def test_every_package_has_its_place_in_the_tree(script):
    inside = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert {f"fastsepconv.{name}": folder for name, folder in script.INSIDE.items()} == inside


def test_the_tests_that_want_a_card_are_all_found(script):
    files = {file for pattern in script.TESTS for file in (ROOT / "tests").glob(pattern)}
    marked = {file for file in (ROOT / "tests").rglob("test_*.py") if MARK.search(file.read_text())}
    assert files == marked and len(files) >= 5


def test_a_card_is_in_sight_and_the_users_choice_goes_first(script, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "plain")
    found = script.environment(Path("tree"))
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1" and found["FASTSEPCONV_CUDA_TIER"] == "plain"
    assert found["PYTHONPATH"].split(":")[0] == "tree" and found["PYTHONSAFEPATH"] == "1"


def test_a_command_that_takes_too_long_is_stopped(script, capsys):
    assert script.run(dict(script.os.environ), ["-c", "import time; time.sleep(60)"], 0.5) == 1
    assert "Stopped after" in capsys.readouterr().err


def test_a_command_that_does_not_heed_an_interrupt_is_ended(script, monkeypatch):
    monkeypatch.setattr(script, "LAST_WORDS_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert script.run(dict(script.os.environ), ["-c", deaf], 1) == 1
    assert time.monotonic() - began < 30


def test_nothing_that_a_command_has_started_runs_on(script, tmp_path):
    file = tmp_path / "alive"
    child = f"import time\nfor i in range(200): open({str(file)!r}, 'w').write(str(i)); time.sleep(0.1)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert script.run(dict(script.os.environ), ["-c", code], 2) == 1
    last = file.read_text()
    time.sleep(0.5)
    assert file.read_text() == last


def test_tests_that_take_too_long_tell_what_has_failed(script, tmp_path, capfd):
    """Without that, a failure at the beginning would be lost with the time that the others took."""
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_wrong(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n")
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), str(slow)]
    assert script.run(dict(script.os.environ), command, 8) == 1
    assert "assert 1 == 2" in capfd.readouterr().out


def test_what_takes_long_is_begun_first_by_some_worker():
    """Each of pytest-xdist's workers gets a stretch of the list."""
    long, short = SimpleNamespace(get_closest_marker=bool), SimpleNamespace(get_closest_marker=lambda name: None)
    items = [*[short] * 7, *[long] * 3, *[short] * 2]
    conftest.pytest_collection_modifyitems(items)
    assert [item is long for item in items] == [True, *[False] * 3] * 3
    conftest.pytest_collection_modifyitems(only_short := [short] * 3)
    assert only_short == [short] * 3


def test_the_time_of_all_is_ten_minutes(script):
    assert script.TEST_SECONDS + script.QUICK_SECONDS + 2 * script.LAST_WORDS_SECONDS <= 590


@pytest.mark.parametrize("found", ["on the path", "nowhere", "no compiler in it"])
def test_numba_is_told_where_the_toolkit_is(script, monkeypatch, tmp_path, found):
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch()
    if found == "on the path":
        (tmp_path / "cuda" / "nvvm").mkdir()
    monkeypatch.setattr(script.shutil, "which", lambda name: None if found == "nowhere" else str(compiler))
    settings = script.environment(Path("tree"))
    told = settings.get("CUDA_HOME")
    if found == "on the path":
        assert told == str(compiler.parents[1])
        assert str(compiler.parent) in settings["PATH"].split(os.pathsep), "where its sanitizer is"
        monkeypatch.setenv("CUDA_HOME", "the user's")
        assert script.environment(Path("tree"))["CUDA_HOME"] == "the user's"
    else:
        assert told in (None, "/usr/local/cuda")


@pytest.mark.skipif(nvidia.obstacle() is None, reason="there is a card here")
def test_without_a_card_no_test_begins():
    done = run("test")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "The CUDA kernels cannot be tested here: " in done.stdout and "Python 3." in done.stdout
    assert " passed" not in done.stdout and "skipped" not in done.stdout


@pytest.mark.skipif(nvidia.obstacle() is None, reason="there is a card here")
def test_without_a_card_the_race_says_so():
    done = run("bench", "--quick")
    assert done.returncode == 4 and done.stderr.startswith("The CUDA kernels cannot be raced here: ")


def test_what_it_does_not_know_is_refused():
    done = run("dance")
    assert done.returncode == 1 and "on_card.py test" in done.stderr
