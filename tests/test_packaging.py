"""What is installed, where, and what the two commands of the README find."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ["fastsepconv", *PROJECT["tool"]["setuptools"]["package-dir"].values()]
FOLDERS_BESIDE = ["scripts", "tests"]
FILES_BESIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml"]


def python(code: str, folder: Path, *options: str) -> str:
    """What `code` prints, run in `folder`."""
    result = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_kernels_is_no_module_of_its_own(tmp_path):
    code = """
import importlib.util, sys
import fastsepconv, fastsepconv.kernels.cpu, fastsepconv.kernels.reference
print("kernels" in sys.modules, importlib.util.find_spec("kernels"), fastsepconv.kernels.__name__)
"""
    assert python(code, tmp_path) == "False None fastsepconv.kernels"


def test_the_tests_themselves_import_kernels_under_its_name():
    import fastsepconv.kernels.cpu  # noqa: F401

    assert "kernels" not in sys.modules
    assert str(ROOT) not in sys.path


def test_every_package_of_the_tree_is_listed():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("__init__.py")]
    names = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    inside = {name if name.startswith("fastsepconv") else f"fastsepconv.{name}" for name in names}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == inside


def build(what: str, tree: Path) -> Path:
    """A "wheel" or "sdist" of the project in `tree`, put beside it."""
    code = f"import setuptools.build_meta as b; print(b.build_{what}({str(tree.parent)!r}))"
    return tree.parent / python(code, tree).splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project."""
    folder = tmp_path_factory.mktemp("build") / "tree"
    for name in FOLDERS + FOLDERS_BESIDE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES_BESIDE:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    return build("wheel", tree)


def test_a_source_archive_holds_what_its_own_commands_want(tree):
    files = [path.relative_to(tree) for name in FOLDERS + FOLDERS_BESIDE for path in (tree / name).rglob("*.*")]
    wanted = {path.as_posix() for path in files if path.suffix != ".pyc"} | set(FILES_BESIDE)
    with tarfile.open(build("sdist", tree)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not wanted - held
    assert {name.partition("/")[0] for name in held} - {""} == {
        *FOLDERS, *FOLDERS_BESIDE, *FILES_BESIDE, "PKG-INFO", "setup.cfg", "fastsepconv.egg-info",
    }  # fmt: skip


def test_the_wheel_holds_one_package_its_types_and_its_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if name.startswith("fastsepconv/")}
    assert [name for name in inside if not name.endswith(".py")] == ["fastsepconv/py.typed"]
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastsepconv", f"fastsepconv-{PROJECT['project']['version']}.dist-info"}
    assert {"fastsepconv/py.typed", "fastsepconv/kernels/geometry.py", "fastsepconv/kernels/cpu/jit.py"} <= set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import fastsepconv, fastsepconv.kernels.cpu.jit as jit
from fastsepconv.cli import main
print(jit.__file__, fastsepconv.__file__, "kernels" in sys.modules)
"""
    site = tmp_path / "site" / "fastsepconv"
    assert python(code, tmp_path) == f"{site / 'kernels' / 'cpu' / 'jit.py'} {site / '__init__.py'} False"


def test_the_package_itself_needs_numpy_numba_and_a_thread_layer():
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["project"]["dependencies"]]
    assert names == ["numpy", "numba", "tbb"]
    assert {"tensorflow", "cuda", "torch", "jax", "demo", "bench"} <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_each_backend_of_keras_has_an_extra_that_brings_both_and_is_named_where_it_lacks(backend, tmp_path):
    extra = PROJECT["project"]["optional-dependencies"][backend]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in extra]
    assert names == [backend, "keras"]
    code = f"""
import os, sys
os.environ["KERAS_BACKEND"] = {backend!r}

class Lacking:
    def find_spec(name, path=None, target=None):
        if name == {backend!r}:
            raise ModuleNotFoundError("it is not there", name=name)

sys.meta_path.insert(0, Lacking)
import fastsepconv
try:
    fastsepconv.FastSeparableConv2D
except ModuleNotFoundError as error:
    print(error)
"""
    assert f"pip install 'fastsepconv[{backend}]'" in python(code, tmp_path)


def test_no_version_is_pinned():
    groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
    requirements = [*PROJECT["project"]["dependencies"], *(r for group in groups for rs in group.values() for r in rs)]
    assert not [r for r in requirements if isinstance(r, str) and "==" in r.split(";")[0]]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    environment = {"PATH": path} if path else None
    command = [shutil.which("make"), "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@needs_make
def test_make_alone_tells_what_there_is():
    result = make()
    assert result.returncode == 0
    assert {"demo", "test", "bench", "lint", "clean"} <= set(re.findall(r"^make (\w+)", result.stdout, re.MULTILINE))


@needs_make
@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_python_that_is_not_there_or_too_old_is_told(tmp_path, target):
    old = tmp_path / "an old python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in ("/nowhere/python3", str(old)):
        result = make(target, f"PYTHON={python}")
        assert result.returncode != 0
        assert f"PYTHON={python} is not a Python from 3.11 to 3.13" in result.stderr


@needs_make
def test_a_machine_without_python_is_told(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    command = [str(tools / "sh"), str(tmp_path / "scripts" / "setup.sh"), "demo"]
    result = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "no Python from 3.11 to 3.13 found" in result.stderr
