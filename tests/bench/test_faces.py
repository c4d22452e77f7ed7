"""The two ways in: the command, and pytest-benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastsepconv import cli
from fastsepconv.bench import results, revision

ROOT = Path(__file__).parents[2]
SMALLEST = "2x2x728-1024/batch1/forward"
QUICKLY = ["--seconds", "0.02", "--rounds", "2"]


def listed(capsys, *arguments) -> list[str]:
    assert cli.main(["bench", "--list", *arguments]) == 0
    return capsys.readouterr().out.split()


def test_by_default_the_xception_layers_are_raced_forward(capsys):
    names = listed(capsys)
    assert len(names) == 30 and all(name.startswith("xception/") and "/forward" in name for name in names)


def test_problems_are_selected_by_suite_batch_pass_and_name(capsys):
    arguments = ["--problems", "tutorial", "--batch", "64", "--pass", "backward", "--only", "/3x3"]
    assert listed(capsys, *arguments) == [
        "tutorial/3x3x728-728/batch64/backward",
        "tutorial/3x3x728-1024/batch64/backward",
    ]


def test_layers_of_bfloat16_have_its_name(capsys):
    names = listed(capsys, "--dtype", "bfloat16", "--only", "19x19x728-728", "--batch", "8")
    assert names == ["xception/19x19x728-728/batch8/forward/bfloat16"]


def test_depthwise_layers_have_every_geometry(capsys):
    names = listed(capsys, "--problems", "depthwise", "--batch", "1", "--only", "74x74x256")
    shapes = ["74x74x256", "74x74x256,5x5", "74x74x256,7x7", "74x74x256,5x5,stride2"]
    assert names == [f"depthwise/{shape}/batch1/forward" for shape in shapes]


def test_networks_are_raced_instead_of_layers(capsys):
    assert listed(capsys, "--network", "tutorial", "--batch", "64") == [
        "tutorial-network/batch64/predict",
        "tutorial-network/batch64/train",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--problems", "alexnet"], ["--providers", "caffe"], ["--batch", "0"], ["--seconds", "0"], ["--rounds", "1"]],
)
def test_a_wrong_command_line_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "nothing has this name"],
        ["--save", "/nowhere/run.json"],
        ["--network", "tutorial", "--dtype", "bfloat16"],
    ],
)
def test_a_selection_that_cannot_be_served_ends_with_2(arguments, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert "Expected" in capsys.readouterr().err


def test_a_race_is_printed_saved_and_given_as_json(capsys, tmp_path):
    arguments = ["--problems", "tutorial", "--only", SMALLEST, *QUICKLY, "--json", "--save", str(tmp_path / "run.json")]
    assert cli.main(["bench", *arguments, "--providers", "fastsepconv-arrays", "fastsepconv-arrays#2"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    names = [record["name"] for record in document["problems"]]
    assert names == [f"tutorial/{SMALLEST}", f"tutorial/{SMALLEST}/rotated"]
    for record in document["problems"]:
        first, second = record["providers"].values()
        assert first["status"] == second["status"] == "timed"
        assert second["times_baseline"]["ratio"] > 0 and "times_baseline" not in first
    assert "tutorial 2x2x728-1024 batch1 forward" in captured.err and "% of peak" in captured.err
    saved = results.load(tmp_path / "run.json")
    assert len(saved["problems"]) == 2 and saved["problems"][0]["bytes_moved"] > 4 * 728 * 1024
    assert saved["copy_gbytes"].keys() == saved["peak_gflops"].keys()
    assert saved["code"] == revision.describe()


def test_a_race_of_bfloat16_holds_tensorflow_and_float32_beside_it(capsys):
    arguments = ["--problems", "tutorial", "--only", f"{SMALLEST}/bf", "--dtype", "bfloat16", *QUICKLY, "--json"]
    providers = ["fastsepconv", "fastsepconv-float32", "tensorflow", "onnxruntime", "fastsepconv-arrays"]
    assert cli.main(["bench", *arguments, "--providers", *providers]) == 0
    document = json.loads(capsys.readouterr().out)
    (record,) = document["problems"]
    assert document["dtype"] == record["dtype"] == "bfloat16"
    found = record["providers"]
    assert found.keys() == set(providers[:3]), "the others have no bfloat16"
    assert {entry["status"] for entry in found.values()} == {"timed"}
    errors = {label: entry["largest_error"] for label, entry in found.items()}
    assert errors["fastsepconv-float32"] < 1e-5 < 1e-4 < errors["fastsepconv"] < record["error_bound"]


def test_pytest_benchmark_is_given_the_times_of_the_race(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="the benchmark's own tests need pytest-benchmark")
    selection = "tutorial and 2x2x728-1024 and batch1-forward and fastsepconv-arrays and not rotated"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-k", selection]
    options = ["--benchmark-max-time=0.02", f"--benchmark-json={tmp_path / 'saved.json'}", "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    saved = json.loads((tmp_path / "saved.json").read_text())
    (benchmark,) = saved["benchmarks"]
    assert benchmark["group"] == "tutorial/2x2x728-1024/batch1/forward"
    info = benchmark["extra_info"]
    assert info["provider"] == "fastsepconv-arrays" and info["first_call_seconds"] > 0 and info["share_of_peak"] > 0
    gflop = 2 * 2 * 2 * 728 * (9 + 1024) / 1e9
    assert benchmark["stats"]["median"] == pytest.approx(gflop / info["gflops"], rel=1e-6)
    assert "numba" in info["versions"] and str(info["threads"]) in info["peak_gflops"]
