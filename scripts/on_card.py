"""Tests or benchmarks on a machine with a card, with its own Python and what that has installed; nothing is installed.

    python3 scripts/on_card.py test [PYTEST_ARGUMENT...]       both tiers against everything, one process a worker
    python3 scripts/on_card.py bench [ARGUMENT...]             `python -m fastsepconv.bench.cuda`
    python3 scripts/on_card.py python [ARGUMENT...]            Python, where `import fastsepconv` works

Needed are PyTorch, numba-cuda, pytest and a card. What else is wanted (Keras, say) may lie as wheels in the folder
wheels/, where `scripts/wheels.py` puts it, and is unpacked. pyproject.toml puts kernels/ and bench/ inside the package;
without installation links in build/on-card/ do.

What is found out is written into the folder that the variable OUT names, or into bench/results/ and the README.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import wheels

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "on-card"
INSIDE = {"kernels": "kernels", "bench": "bench"}  # folders that are installed inside the package, by their names there
TESTS = ("kernels/cuda/test_*on_card*.py", "bridge/test_*on_card*.py")
WARM_UP = ("-m", "tests.kernels.cuda.warm_up")
MISSING = 4  # the exit code of what cannot run here
WORKERS = max(2, min(8, (os.cpu_count() or 2) // 2))
# Ten minutes in all. A race that is cut off has saved what it knows; tests tell what has failed so far, given a while.
TEST_SECONDS, QUICK_SECONDS, LAST_WORDS_SECONDS = 355, 190, 20


def lay_out(tree: Path = TREE) -> Path:
    """A folder from which `fastsepconv` and `tests` can be imported, made of links, and of the wheels' contents."""
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "fastsepconv"
    package.mkdir(parents=True)
    for path in (ROOT / "fastsepconv").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name, folder in INSIDE.items():
        (package / name).symlink_to(ROOT / folder)
    (tree / "tests").symlink_to(ROOT / "tests")
    wheels.unpack(ROOT / "wheels", tree)
    return tree


def out() -> Path | None:
    """The folder that OUT names, made where it is not there; None: everything has its place in the checkout."""
    named = os.environ.get("OUT")
    if not named:
        return None
    folder = Path(named).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(tree: Path) -> dict[str, str]:
    """The process's own, with the folder on Python's path, the checkout off it, and cards and toolkit in sight.

    Of two cards the second is for the tests that want two; where there is one, naming two shows that one.
    """
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    defaults = {"CUDA_VISIBLE_DEVICES": "0,1", "KERAS_BACKEND": "torch", "FASTSEPCONV_CUDA_TIER": "fast"}
    found = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or toolkit()
    if found:
        defaults["CUDA_HOME"] = found
        tools = [str(Path(found, name)) for name in ("bin", "compute-sanitizer")]
        settings["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *tools])
    return {**defaults, **os.environ, **settings}


def toolkit() -> str | None:
    """The folder of an installed CUDA toolkit, where numba-cuda looks for its compiler if no wheel has brought that."""
    compiler = shutil.which("nvcc")
    places = [*([Path(compiler).resolve().parents[1]] if compiler else []), Path("/usr/local/cuda")]
    return next((str(place) for place in places if (place / "nvvm").is_dir()), None)


def test(settings: dict[str, str], arguments: list[str]) -> int:
    """Run the tests that want a card, and write down what passed. A worker whose card hangs on an error is replaced.

    First all kernels are compiled, on all cores; where nothing can be tested, that says so, and no test begins.
    """
    folder = out()
    ledger = (folder or ROOT / "build") / "cuda-ledger.jsonl"
    ledger.unlink(missing_ok=True)
    end = time.monotonic() + TEST_SECONDS
    # Each worker computes what is true; as many threads in every one of them would only get in each other's way.
    settings = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", **settings}
    ready = run(settings, [*WARM_UP], TEST_SECONDS / 3)
    if ready == MISSING:
        return MISSING
    # PyTorch's deterministic mode, by which new memory is full of NaN, wants cuBLAS's workspace to be fixed.
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **settings, "FASTSEPCONV_CUDA_LEDGER": str(ledger)}
    files = [str(file) for pattern in TESTS for file in sorted((ROOT / "tests").glob(pattern))]
    command = ["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short", "--durations=10", *files]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS), "--dist=worksteal", f"--max-worker-restart={2 * WORKERS}"]
    else:
        print("pytest-xdist is missing: if a kernel fails so that the card has to be left, later tests fail too.")
    code = run(settings, command + arguments, end - time.monotonic())
    # Without OUT the README too, which says what the status says.
    into = ["--file", str(folder / "cuda-status.json")] if folder else ["--readme", str(ROOT / "README.md")]
    written = run(settings, ["-m", "fastsepconv.bench.cuda_status", "--ledger", str(ledger), *into])
    return ready or code or written


def bench(settings: dict[str, str], arguments: list[str]) -> int:
    """Race, within its time where that is asked to be short; without OUT the README's table follows the results."""
    folder = out()
    into = ["--folder", str(folder)] if folder else []
    seconds = QUICK_SECONDS if "--quick" in arguments else None
    code = run(settings, ["-m", "fastsepconv.bench.cuda", *into, *arguments], seconds)
    if folder or code == MISSING:
        return code
    return run(settings, ["-m", "fastsepconv.bench.cuda_report", "--readme", str(ROOT / "README.md")]) or code


def run(settings: dict[str, str], command: list[str], seconds: float | None = None) -> int:
    """The exit code of this Python with that command; 1 where it takes longer.

    Then it is interrupted, and after its last words ended, with all that it has started: what runs on would disturb.
    """
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=settings, process_group=0, preexec_fn=_heed_interrupts
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"Stopped after {seconds:.0f} s: {' '.join(command)}", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_SECONDS)
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(what: str, *arguments: str) -> int:
    """Do what the command line says; returns the exit code."""
    settings = environment(lay_out())
    if what == "test":
        return test(settings, [*arguments])
    if what == "bench":
        return bench(settings, [*arguments])
    return run(settings, [*arguments])


if __name__ == "__main__":
    if sys.argv[1:2] not in (["test"], ["bench"], ["python"]):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
