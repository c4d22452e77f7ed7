"""`make test-cuda` and `make bench-cuda` on a machine where nothing is installed or can be."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
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
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # where Python finds what the script imports
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


def test_wheels_that_travel_along_are_unpacked_and_those_for_another_python_told(script, monkeypatch, tmp_path, capsys):
    for folder in ("fastsepconv", "kernels", "bench", "tests", "wheels"):
        (tmp_path / folder).mkdir()
    for name, tags in {"some": "py3-none-any", "other": "cp38-cp38-manylinux2014_x86_64"}.items():
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-{tags}.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("half of it")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    tree = script.lay_out(tmp_path / "tree")
    assert (tree / "some" / "__init__.py").exists() and not (tree / "other").exists()
    broken, other = capsys.readouterr().err.splitlines()
    assert broken.startswith("broken-1.0-py3-none-any.whl is no wheel, and left out")
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert "other-1.0-cp38" in other and "is not for this Python" in other and f"`make wheels FOR={here}`" in other
    assert (tree / "fastsepconv" / "kernels").resolve() == tmp_path / "kernels"
    assert script.lay_out(tree) == tree, "and once more over what is there"


def test_wheels_are_told_by_their_names(script, monkeypatch):
    suits = script.wheels.suits
    monkeypatch.setattr(script.wheels.sys, "version_info", (3, 12, 3))
    monkeypatch.setattr(script.wheels.sys, "platform", "linux")
    monkeypatch.setattr(script.wheels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(script.wheels.sysconfig, "get_config_var", lambda name: None)
    tags = ["cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64", "py3-none-any", "py2.py3-none-any"]
    tags += ["cp39-abi3-manylinux2014_x86_64", "1-cp312-none-linux_x86_64", "py312-none-any"]
    assert all(suits(f"some-1.0-{each}.whl") for each in tags)
    others = ["cp311-cp311-manylinux2014_x86_64", "cp312-cp312-manylinux2014_aarch64", "cp312-cp312-macosx_11_0_arm64"]
    others += ["cp313-abi3-manylinux2014_x86_64", "cp312-cp312t-manylinux2014_x86_64", "py2-none-any"]
    others += ["cp312-cp312-musllinux_1_2_x86_64", "cp312-cp312-win_amd64"]
    assert not any(suits(f"some-1.0-{each}.whl") for each in others)
    monkeypatch.setattr(script.wheels.sysconfig, "get_config_var", lambda name: 1)
    assert suits("some-1.0-cp312-cp312t-linux_x86_64.whl") and not suits("some-1.0-cp39-abi3-linux_x86_64.whl")


def test_wheels_are_downloaded_for_the_python_that_is_named_each_package_once(script, monkeypatch, tmp_path, capsys):
    def pip(command, check):
        folder = Path(command[command.index("--dest") + 1])
        for package in command[-2:]:
            (folder / f"{package}-2.0-cp312-cp312-manylinux2014_x86_64.whl").touch()
        asked.extend(command)
        return SimpleNamespace(returncode=0)

    asked, folder = [], tmp_path / "wheels"
    folder.mkdir()
    for name in ("optree-1.0-cp311-cp311-linux_x86_64.whl", "other-1.0-py3-none-any.whl"):
        (folder / name).touch()
    monkeypatch.setattr(script.wheels.subprocess, "run", pip)
    assert script.wheels.download(["keras", "optree"], "3.12", folder) == 0
    assert asked[asked.index("--python-version") + 1] == "3.12" and "manylinux_2_28_x86_64" in asked
    ending = "2.0-cp312-cp312-manylinux2014_x86_64.whl"
    assert sorted(wheel.name for wheel in folder.iterdir()) == [
        f"keras-{ending}", f"optree-{ending}", "other-1.0-py3-none-any.whl",
    ]  # fmt: skip
    assert "for Python 3.12: keras-2.0" in capsys.readouterr().out


def test_a_download_that_fails_leaves_the_folder_as_it_is(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.wheels.subprocess, "run", lambda *arguments, **more: SimpleNamespace(returncode=1))
    assert script.wheels.download(["keras"], "3.12", tmp_path / "wheels") == 1
    assert not (tmp_path / "wheels").exists()


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


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def as_a_shell_starts_it(request):
    """In the background, a shell's commands ignore interrupts."""
    usual = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("as_a_shell_starts_it")
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
    assert done.returncode == 4 and "The CUDA kernels cannot be raced here: " in done.stderr.splitlines()[-1]


@pytest.fixture
def fake_python(tmp_path):
    """A Python that notes what it is asked to run, and fails at what it is told to fail at."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\necho "$2" >> "{tmp_path}/ran"\n[ "$2" != "$FAILS" ]\n')
    file.chmod(0o755)
    return file


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("fails", ["test", "bench", "nothing"])
@pytest.mark.parametrize("options", [[], ["-j2"]], ids=["", "-j2"])
def test_what_passed_is_raced_even_where_a_test_failed_and_that_is_told(tmp_path, fake_python, fails, options):
    done = subprocess.run(
        ["make", "-C", str(ROOT), *options, "test-cuda", "bench-cuda", f"PYTHON={fake_python}"],
        env=os.environ | {"FAILS": fails}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (tmp_path / "ran").read_text().split() == ["test", "bench"]
    assert bool(done.returncode) == (fails != "nothing"), done.stdout + done.stderr


@pytest.fixture
def commands(script, monkeypatch, tmp_path):
    """What the script would run, which all passes."""
    ran = []
    monkeypatch.setattr(script, "run", lambda settings, command, seconds=None: ran.append(command) or 0)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    return ran


def test_what_is_found_out_is_written_where_out_says(script, commands, monkeypatch, tmp_path):
    folder = tmp_path / "comes" / "back"
    monkeypatch.setenv("OUT", str(folder))
    assert script.test({}, []) == script.bench({}, ["--quick"]) == 0
    *_, status, race = commands
    ledger, file = folder / "cuda-ledger.jsonl", folder / "cuda-status.json"
    assert status[1:] == ["fastsepconv.bench.cuda_status", "--ledger", str(ledger), "--file", str(file)]
    assert race[1:] == ["fastsepconv.bench.cuda", "--folder", str(folder), "--quick"] and folder.is_dir()


def test_without_out_it_is_written_into_the_checkout_and_the_readmes_table_too(script, commands, monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    script.test({}, [])
    script.bench({}, [])
    *_, status, race, table = commands
    ledger, into_readme = str(tmp_path / "build/cuda-ledger.jsonl"), ["--readme", str(tmp_path / "README.md")]
    assert status[2:] == ["--ledger", ledger, *into_readme]
    assert race[1:] == ["fastsepconv.bench.cuda"]
    assert table[1:] == ["fastsepconv.bench.cuda_report", *into_readme]


@pytest.mark.parametrize(("code", "count"), [(1, 2), (4, 1)])
def test_a_race_that_failed_is_told_in_the_readme_and_one_that_never_began_is_not(script, monkeypatch, code, count):
    monkeypatch.delenv("OUT", raising=False)
    ran = []
    monkeypatch.setattr(
        script, "run", lambda settings, command, *seconds: ran.append(command) or code * (len(ran) == 1)
    )
    assert script.bench({}, []) == code and len(ran) == count


def test_what_it_does_not_know_is_refused():
    done = run("dance")
    assert done.returncode == 1 and "on_card.py test" in done.stderr
