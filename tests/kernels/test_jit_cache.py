"""The disk cache of compiled kernels: a kernel is compiled once, and whatever is wrong with the folder only costs time.

Each case runs in processes of its own, on a module and a cache folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import pytest

from fastsepconv.kernels import cache_folder
from fastsepconv.kernels.cpu import disk_cache

MODULE = """
    from numba import types
    from fastsepconv.kernels.cpu import jit

    def scaled_by(factor):
        @jit.kernel
        def scale(x):
            return factor * x
        return scale

    double, triple = scaled_by(2.0), scaled_by(3.0)

    @jit.kernel
    def both(x):
        return double(x) + triple(x)

    @jit.callback(types.float64(types.float64))
    def ask(x):
        return both(x) + 1.0
"""
PRINT = """
    import json
    from scratch import ask, both
    from fastsepconv.kernels.cpu import jit
    print(json.dumps([both(1.0), ask.ctypes(1.0), jit.state()["compiled"], jit.state()["loaded"]]))
"""
COMPILED = [5.0, 6.0, 4, 0]  # both, double, triple, ask
LOADED = [5.0, 6.0, 0, 2]  # both and ask; what they call lies inside them


@pytest.fixture
def scratch(tmp_path) -> Path:
    """A folder with a module of kernels."""
    (tmp_path / "scratch.py").write_text(textwrap.dedent(MODULE))
    return tmp_path


def start(folder: Path, code: str = PRINT, **environment: str) -> subprocess.Popen:
    """Start a process that runs `code` beside the module."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "FASTSEPCONV_"))}
    settings = {**kept, "PYTHONPATH": str(folder), "FASTSEPCONV_CACHE_DIR": str(folder / "cache"), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[list, str]:
    """What the process printed, and its stderr. It must end well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


def run(folder: Path, code: str = PRINT, **environment: str) -> list:
    """What `code` prints; it must warn of nothing."""
    printed, err = finish(start(folder, code, **environment))
    assert "Warning" not in err, err
    return printed


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jit"))


def test_a_second_process_compiles_nothing(scratch):
    assert run(scratch) == COMPILED
    assert run(scratch) == LOADED


FIRST_CALL = """
    import json, sys
    import fastsepconv, numpy as np
    from fastsepconv.kernels.cpu import jit
    x, depthwise, pointwise = np.ones((2, 5, 6, 3), "f"), np.ones((3, 3, 3, 1), "f"), np.ones((1, 1, 3, 7), "f")
    y = fastsepconv.separable_conv2d(x, depthwise, pointwise)
    d_x = fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, y)[0]
    loaded_alone = jit.state()["compiled"] == 0 and "numba.np.linalg" not in sys.modules
    import numba
    double_last = numba.njit(lambda values: np.linalg.norm(np.sort(values)[-1:]) * 2)
    print(json.dumps([loaded_alone, float(d_x.sum()), float(double_last(np.array([3.0, 1.0])))]))
"""


def test_loading_imports_nothing_of_what_numba_needs_to_compile(scratch):
    """The imports would take longer than all else at a first call. Whoever compiles afterwards finds Numba whole."""
    compiled, loaded = run(scratch, FIRST_CALL), run(scratch, FIRST_CALL)
    assert (compiled[0], loaded[0]) == (False, True)
    assert compiled[1:] == loaded[1:]
    assert loaded[2] == 6.0


def test_functions_of_one_line_that_close_over_different_values_are_told_apart(scratch):
    code = """
        import json
        from scratch import double, triple
        from fastsepconv.kernels.cpu import jit
        print(json.dumps([triple(1.0), double(1.0), jit.state()["compiled"]]))
    """
    assert run(scratch, code) == [3.0, 2.0, 2]
    assert run(scratch, code) == [3.0, 2.0, 0]


def test_one_loaded_and_one_compiled_of_a_line_are_told_apart(scratch):
    """Their machine code meets in one process, where names that differ by a count alone would collide."""
    compile_one = "import json, scratch; scratch.double(1.0); print(json.dumps([]))"
    run(scratch, compile_one)
    assert run(scratch, PRINT.replace("from scratch", "import scratch; scratch.triple(1.0)\n    from scratch")) == [
        5.0, 6.0, 3, 1,
    ]  # fmt: skip


def test_an_edit_is_seen_wherever_it_is(scratch):
    (scratch / "constants.py").write_text("FACTOR = 1.0\n")
    source = (scratch / "scratch.py").read_text()
    (scratch / "scratch.py").write_text(
        source.replace("factor * x", "FACTOR * factor * x") + "\nfrom constants import FACTOR\n"
    )
    assert run(scratch) == COMPILED
    (scratch / "constants.py").write_text("FACTOR = 2.0\n")
    assert run(scratch) == [10.0, 11.0, 4, 0]
    (scratch / "constants.py").write_text("FACTOR = 1.0\n")
    assert run(scratch) == LOADED


def test_nothing_is_kept_when_the_sources_change_after_they_were_imported(scratch):
    code = """
        import json, pathlib
        from scratch import both
        from fastsepconv.kernels.cpu import jit
        with open("scratch.py", "a") as source:
            source.write("# edited meanwhile\\n")
        print(json.dumps([both(1.0), jit.state()["entries"]]))
    """
    assert run(scratch, code) == [5.0, 0]
    assert run(scratch) == COMPILED


def test_another_processor_tile_or_option_has_entries_of_its_own(scratch):
    settings = [
        {},
        {"FASTSEPCONV_TILE": "portable"},
        {"NUMBA_CPU_FEATURES": ""},
        {"NUMBA_BOUNDSCHECK": "1"},
        {"NUMBA_OPT": "1"},
    ]
    for setting in settings:
        assert run(scratch, **setting) == COMPILED, setting
    for setting in settings:
        assert run(scratch, **setting) == LOADED, setting


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    file.write_bytes({
        "empty": b"",
        "cut short": content[: len(content) // 2],
        "no payload": content[:37],
        "garbage": os.urandom(1000),
        "one bit": bytes(changed),
        "another file": b"# no kernel\n" * 100,
    }[how])  # fmt: skip


def test_a_broken_entry_is_compiled_anew(scratch):
    run(scratch)
    for how in ("empty", "cut short", "no payload", "garbage", "one bit", "another file"):
        for file in entries(scratch):
            spoil(file, how)
        assert run(scratch) == COMPILED, how
    assert run(scratch) == LOADED


def test_a_whole_entry_of_something_else_is_compiled_anew(scratch):
    run(scratch)
    payload = b"not a pickle"
    for file in entries(scratch):
        file.write_bytes(disk_cache._MAGIC + cache_folder.digest(payload) + payload)
    assert run(scratch) == COMPILED


def test_an_entry_that_is_a_folder_costs_a_compilation_and_one_warning(scratch):
    run(scratch)
    for file in entries(scratch):
        file.unlink()
        (file / "inside").mkdir(parents=True)
    printed, err = finish(start(scratch))
    assert printed == COMPILED
    assert err.count("RuntimeWarning: Compiled kernels cannot be kept") == 1


def test_a_cache_folder_that_cannot_be_made_costs_compilations_and_one_warning(scratch):
    (scratch / "cache").write_text("a file in its place")
    printed, err = finish(start(scratch))
    assert printed == COMPILED
    assert err.count("RuntimeWarning: Compiled kernels cannot be kept") == 1
    assert "FASTSEPCONV_CACHE_DIR" in err


def test_a_folder_that_cannot_be_written_is_read(scratch):
    run(scratch)
    code = "import os, tempfile\ndef refuse(*a, **k): raise OSError(30, 'Read-only file system')\n"
    code += "tempfile.NamedTemporaryFile = tempfile.TemporaryFile = os.replace = os.unlink = os.utime = refuse\n"
    assert run(scratch, code + textwrap.dedent(PRINT)) == LOADED
    for file in entries(scratch):
        spoil(file, "cut short")
    printed, err = finish(start(scratch, code + textwrap.dedent(PRINT)))
    assert printed == COMPILED
    assert err.count("RuntimeWarning: Compiled kernels cannot be kept") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this platform has no /dev/full to stand for a full disk")
def test_a_full_disk_costs_compilations_and_one_warning(scratch):
    code = "import tempfile\nwhole = tempfile.NamedTemporaryFile\n"
    code += "class Full:\n"
    code += "    def __init__(self, **k):\n        self.name, self.real = whole(**k).name, open('/dev/full', 'wb')\n"
    code += "    def __enter__(self): return self\n    def __exit__(self, *a): pass\n"
    code += "    def write(self, content): self.real.write(content)\n    def close(self): self.real.close()\n"
    code += "tempfile.NamedTemporaryFile = Full\n"
    printed, err = finish(start(scratch, code + textwrap.dedent(PRINT)))
    assert printed == COMPILED
    assert err.count("RuntimeWarning: Compiled kernels cannot be kept") == 1
    assert "No space left" in err
    assert not [path for path in (scratch / "cache").rglob("*") if path.is_file()]


def test_processes_that_start_together_share_the_folder(scratch):
    results = [finish(process) for process in [start(scratch) for _ in range(4)]]
    assert [printed[:2] for printed, _ in results] == [[5.0, 6.0]] * 4
    assert not [err for _, err in results if "Warning" in err]
    assert run(scratch) == LOADED
    assert not list(scratch.rglob("*.tmp"))


def test_a_home_that_is_not_there_costs_no_exception(scratch):
    environment = {"FASTSEPCONV_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/proc/nowhere"}
    printed, _ = finish(start(scratch, **environment))
    assert printed == COMPILED


def test_numbas_own_folder_is_left_alone(scratch):
    theirs = scratch / "numba"
    assert run(scratch, NUMBA_CACHE_DIR=str(theirs)) == COMPILED
    assert not theirs.exists()


def test_folders_left_unused_longest_are_dropped(scratch):
    run(scratch)
    base = scratch / "cache" / "jit"
    (ours,) = base.iterdir()
    old = [base / f"{number:032x}" for number in range(40)]
    for age, folder in enumerate(old):
        shutil.copytree(ours, folder)
        os.utime(folder, (10**9 - age, 10**9 - age))
    (base / "not ours").mkdir()
    (scratch / "scratch.py").write_text((scratch / "scratch.py").read_text() + "# edited\n")
    run(scratch)
    kept = {path.name for path in base.iterdir()}
    assert len(kept) == disk_cache._FOLDERS_KEPT + 1
    assert {"not ours", ours.name, old[0].name} <= kept
    assert old[-1].name not in kept


def test_what_a_killed_process_left_half_written_is_dropped(scratch):
    run(scratch)
    (entry, *_) = entries(scratch)
    for name, age in (("old.tmp", 10**9), ("fresh.tmp", None)):
        (entry.parent / name).write_bytes(b"half")
        if age:
            os.utime(entry.parent / name, (age, age))
    entry.unlink()
    spoil(entries(scratch)[0], "empty")
    run(scratch, PRINT + "    import scratch; scratch.double(1.0), scratch.triple(1.0), scratch.both(1)\n")
    assert [path.name for path in entry.parent.glob("*.tmp")] == ["fresh.tmp"]


def test_listeners_hear_of_each_compilation_from_start_to_end(scratch):
    code = """
        import json
        from scratch import both
        from fastsepconv.kernels.cpu import jit
        heard = []
        with jit.on_compile(lambda name, phase: heard.append(f"{name.rsplit('.')[-1]} {phase}")):
            both(1.0)
        both(1)
        print(json.dumps(heard))
    """
    first = ["both start", "scale start", "scale end", "scale start", "scale end", "both end"]
    assert run(scratch, code) == first
    assert run(scratch, code) == []


def test_the_state_tells_folder_entries_and_size(scratch):
    code = """
        import json
        from scratch import both
        from fastsepconv.kernels.cpu import jit
        both(1.0)
        print(json.dumps(jit.state()))
    """
    state = run(scratch, code)
    files = entries(scratch)
    assert state["folder"] == str(scratch / "cache" / "jit")
    assert state["entries"] == len(files) == 3
    assert state["bytes"] == sum(file.stat().st_size for file in files)
    assert state["problem"] is None


def test_the_state_tells_why_nothing_can_be_kept(scratch):
    (scratch / "cache").write_text("a file in its place")
    code = "import json\nfrom fastsepconv.kernels.cpu import jit\nprint(json.dumps(jit.state()))"
    assert "FASTSEPCONV_CACHE_DIR" in run(scratch, code)["problem"]


def test_what_is_closed_over_but_has_no_lasting_name_is_not_kept(scratch):
    with (scratch / "scratch.py").open("a") as source:
        source.write(
            textwrap.dedent("""
            def picking(table):
                @jit.kernel
                def pick(i):
                    return table[0] + i
                return pick

            class Odd(tuple):
                pass

            known, unknown = picking((1.0, 2.0)), picking(({"a": object()}["a"],))
            from fastsepconv.kernels.cpu.disk_cache import DiskCache
            from numba.core.registry import cpu_target
            codegen = cpu_target.target_context.codegen()
        """)
        )
    code = """
        import json, scratch
        files = [scratch.DiskCache(f.py_func)._file((), scratch.codegen) for f in (scratch.known, scratch.unknown)]
        print(json.dumps([file is None for file in files]))
    """
    assert run(scratch, code) == [False, True]


def test_the_version_of_numba_is_part_of_the_folder(monkeypatch):
    folders = disk_cache._source_folders(test_the_version_of_numba_is_part_of_the_folder)
    before = disk_cache._hash_sources(folders, disk_cache._hash_folder)
    monkeypatch.setattr(numba, "__version__", "0.0.0")
    assert disk_cache._hash_sources(folders, disk_cache._hash_folder) != before
