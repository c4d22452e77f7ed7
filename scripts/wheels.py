"""Packages that travel along to a machine which can install nothing: downloaded here, unpacked there.

    python3 scripts/wheels.py [--python 3.12] [PACKAGE...]

The wheels lie in wheels/. They are for Linux on x86-64 and for the Python of that machine, which need not be the one
that runs this; of each package there is one. Without names: what Keras on PyTorch needs beyond PyTorch.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "wheels"
# Keras's other dependencies (absl-py, h5py, ml_dtypes, numpy, packaging, rich) come beside a PyTorch more often than
# not; whoever lacks one names it.
PACKAGES = ("keras", "namex", "optree")
# pip takes a platform by its letter: these are what wheels for x86-64 are called.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def download(packages: Sequence[str], version: str, folder: Path = FOLDER) -> int:
    """Put the packages' wheels for that version of Python into the folder, in others' place; pip's exit code."""
    with tempfile.TemporaryDirectory() as new:
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        for_python = ["--implementation", "cp", "--python-version", version, *platforms]
        command = ["-m", "pip", "download", "--only-binary=:all:", "--no-deps", "--dest", new, *for_python, *packages]
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            return code
        folder.mkdir(exist_ok=True)
        for wheel in sorted(Path(new).glob("*.whl")):
            for old in folder.glob(f"{_package(wheel)}-*.whl"):
                old.unlink()
            (folder / wheel.name).write_bytes(wheel.read_bytes())
    print(f"In {folder}, for Python {version}: {', '.join(wheel.name for wheel in sorted(folder.glob('*.whl')))}")
    return 0


def unpack(folder: Path, tree: Path) -> None:
    """Unpack the folder's wheels into a tree. What does not suit the Python that runs is left out, and that is said."""
    for wheel in sorted(folder.glob("*.whl")):
        if not suits(wheel.name):
            here = f"{platform.python_version()} on {sysconfig.get_platform()}"
            minor = "{}.{}".format(*sys.version_info[:2])
            _warn(f"{wheel.name} is not for this Python, {here}, and left out: `make wheels FOR={minor}` brings one.")
            continue
        try:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(tree)
        except zipfile.BadZipFile as error:
            _warn(f"{wheel.name} is no wheel, and left out: {error}.")


def suits(name: str) -> bool:
    """Whether a wheel of that file name is for the Python that runs, by its tags.

    Of the system's age, which a tag tells as well, nothing is asked.
    """
    *_, pythons, abis, platforms = name.removesuffix(".whl").split("-")
    if not any(_platform_suits(each) for each in platforms.split(".")):
        return False
    return any(_python_suits(python, abi) for python in pythons.split(".") for abi in abis.split("."))


def _python_suits(python: str, abi: str) -> bool:
    major, minor = sys.version_info[:2]
    own = f"cp{major}{minor}"
    if abi == "none":
        return python in (f"py{major}", f"py{major}{minor}", own)
    threads = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    if abi == "abi3":  # of this or an older CPython, which kept the lock
        least = python.removeprefix(f"cp{major}")
        return not threads and least.isdigit() and int(least) <= minor
    return python == own and abi == own + threads


def _platform_suits(tag: str) -> bool:
    of_linux = sys.platform == "linux" and tag.startswith(("manylinux", "linux"))
    return tag == "any" or (of_linux and tag.endswith(f"_{platform.machine()}"))


def _package(wheel: Path) -> str:
    return wheel.name.partition("-")[0]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Download; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = "{}.{}".format(*sys.version_info[:2])
    parser.add_argument(
        "--python", default=own, metavar="VERSION", help="that machine's (default: this one's, %(default)s)"
    )
    parser.add_argument(
        "packages", nargs="*", default=PACKAGES, metavar="PACKAGE", help=f"default: {' '.join(PACKAGES)}"
    )
    args = parser.parse_args(arguments)
    return download(args.packages, args.python)


if __name__ == "__main__":
    sys.exit(main())
