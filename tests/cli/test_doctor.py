"""`fastsepconv doctor`: what it says of a well machine, and of each thing that is not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from fastsepconv.cli import doctor, main
from fastsepconv.kernels import nvidia
from fastsepconv.kernels.nvidia import Card

HIDE_TENSORFLOW = "sys.modules.update(tensorflow=None, keras=None)"
NAMES = ["processor", "threads", "cache", "kernels", "backend", "tensorflow", "torch", "cuda"]


def doctor_in_a_process(*arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    code = f"import sys; {before}\nfrom fastsepconv.cli import main\nsys.exit(main({['doctor', *arguments]!r}))"
    settings = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_well_machine_in_json(capsys):
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["well"] is True
    assert list(document["checks"]) == NAMES
    assert document["checks"]["kernels"]["details"]["relative_error"] < 1e-5
    assert document["checks"]["threads"]["details"]["layer"] in ("own", "tbb", "omp", "workqueue")
    assert document["checks"]["tensorflow"]["details"]["path"] in ("c-api", "numpy_function")
    assert document["versions"]["numba"]


def test_the_screen_is_one_screen():
    result = doctor_in_a_process()
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "\033" not in result.stdout
    assert lines[-1] == "All is well."
    assert [line.split()[1] for line in lines if line.startswith(("ok", "note", "ill"))] == NAMES


def test_the_package_alone_is_well():
    hidden = "sys.modules.update(rich=None, matplotlib=None, sklearn=None)"
    result = doctor_in_a_process("--json", before=f"{hidden}; {HIDE_TENSORFLOW}")
    assert result.returncode == 0, result.stdout + result.stderr
    tensorflow = json.loads(result.stdout)["checks"]["tensorflow"]
    assert tensorflow["state"] == "note" and "fastsepconv[tensorflow]" in tensorflow["advice"]


@pytest.mark.parametrize(
    ("check", "setting"),
    [
        ("threads", {"FASTSEPCONV_NUM_THREADS": "-3"}),
        ("processor", {"FASTSEPCONV_TILE": "pentium"}),
        ("cache", {"FASTSEPCONV_CACHE_DIR": "/proc/nowhere"}),
        ("backend", {"FASTSEPCONV_BACKEND": "abacus"}),
    ],
)
def test_a_wrong_setting_is_named(check, setting):
    result = doctor_in_a_process("--json", before=HIDE_TENSORFLOW, **setting)
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert document["well"] is False
    finding = document["checks"][check]
    ((variable, _),) = setting.items()
    assert finding["state"] == "ill" and variable in finding["text"]
    texts = [finding["text"] for finding in document["checks"].values()]
    assert sum("Invalid value" in text for text in texts) <= 1


def test_what_could_be_better_is_a_note_and_no_illness():
    settings = {"NUMBA_THREADING_LAYER": "workqueue", "FASTSEPCONV_BACKEND": "reference"}
    result = doctor_in_a_process("--json", before=HIDE_TENSORFLOW, **settings)
    assert result.returncode == 0
    checks = json.loads(result.stdout)["checks"]
    for name in ("threads", "backend"):
        assert checks[name]["state"] == "note" and checks[name]["advice"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="haswell is an x86-64 CPU")
@pytest.mark.parametrize(
    ("features", "state", "said"),
    [
        (None, "note", "this machine's features, which NUMBA_CPU_NAME alone leaves as they are"),
        ("", "ok", "tile avx2 chosen for haswell"),
        ("", "ok", "It has what every haswell has"),
        ("+avx,+avx2,+fma", "ok", "It has avx2, fma, avx"),
    ],
)
def test_a_processor_named_without_its_features_is_noted(features, state, said):
    settings = {"NUMBA_CPU_NAME": "haswell", **({} if features is None else {"NUMBA_CPU_FEATURES": features})}
    code = "from fastsepconv.cli import doctor; print(*doctor._processor()[:3], sep='\\n')"
    output = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **settings}, text=True)
    found, text, *advice = output.splitlines()
    assert found == state and said in text
    assert ("set NUMBA_CPU_FEATURES as well" in " ".join(advice)) == (state == "note")


def test_a_kernel_that_computes_wrongly_is_an_illness(monkeypatch, capsys):
    from fastsepconv.kernels import cpu

    monkeypatch.setattr(cpu, "separable_forward", lambda g, x, d, p, bias, out: out.fill(1.0))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "cannot be trusted" in " ".join(out.split())
    assert out.splitlines()[-1] == "Not well: kernels."


@pytest.mark.parametrize(
    ("obstacle", "cards", "installed", "state", "said"),
    [
        ("there is no NVIDIA driver (libcuda cannot be loaded)", [], True, "ok", "cannot run here: there is no NVIDIA"),
        ("numba-cuda is not installed", [Card("A card", (9, 0))], False, "note", "numba-cuda is not installed"),
        ("the card, Old (5.2), is too old", [Card("Old", (5, 2))], True, "ok", "cannot run here: the card, Old (5.2)"),
    ],
)
def test_what_keeps_cuda_from_running_is_told(monkeypatch, obstacle, cards, installed, state, said):
    monkeypatch.setattr(nvidia, "look", lambda: ("for CUDA 13.0" if cards else "none", cards))
    monkeypatch.setattr(nvidia, "obstacle", lambda: obstacle)
    monkeypatch.setattr(doctor, "_version", lambda package: "0.30" if installed else None)
    finding = doctor._cuda()
    assert finding.state == state and said in finding.text
    assert ("fastsepconv[cuda13]" in finding.advice) == (state == "note")
    assert finding.details["cards"] == [card.name for card in cards]


def test_cuda_in_the_simulator_is_told():
    result = doctor_in_a_process("--json", before=HIDE_TENSORFLOW, NUMBA_ENABLE_CUDASIM="1", FASTSEPCONV_BACKEND="cuda")
    assert result.returncode == 0, result.stdout + result.stderr
    checks = json.loads(result.stdout)["checks"]
    assert checks["backend"]["text"].startswith("cuda, since it was asked for")
    assert "Numba's simulator" in checks["cuda"]["text"]
    assert checks["cuda"]["details"]["tiers"].startswith("plain kernels for every operation")


@pytest.mark.parametrize(("variable", "value"), [("FASTSEPCONV_CUDA_TIER", "quick"), ("FASTSEPCONV_TF32", "yes")])
def test_a_wrong_setting_of_the_cuda_kernels_is_named(variable, value):
    settings = {"NUMBA_ENABLE_CUDASIM": "1", variable: value}
    result = doctor_in_a_process("--json", before=HIDE_TENSORFLOW, **settings)
    assert result.returncode == 1
    finding = json.loads(result.stdout)["checks"]["cuda"]
    assert finding["state"] == "ill" and variable in finding["text"]


def test_help_shows_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert "examples:" in out and "something is not well" in out
