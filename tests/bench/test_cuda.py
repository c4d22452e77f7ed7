"""The race on a card as far as it needs none: what is raced, how a run is kept, and what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastsepconv.bench import cuda, cuda_problems, cuda_report
from fastsepconv.bench.cuda_problems import BACKWARD, BOTH, FORWARD, CudaProblem
from fastsepconv.bench.problems import XCEPTION
from fastsepconv.cli import console
from fastsepconv.kernels import nvidia

CEILINGS = {"copy": 4e12, "float32": 5e13, "tf32": 4e14, "bfloat16": 8e14}
LAYERS = [CudaProblem("pointwise", 19, 728, 8 * n, 32, FORWARD, "tf32") for n in range(1, 15)]
MIDDLE = CudaProblem("separable", 19, 728, 728, 32, FORWARD, "tf32")


def entry(status="timed", median=2e-4, **more):
    if status != "timed":
        return {"status": status, "reason": "for a reason"} | more
    seconds = {"median": median, "q25": median * 0.9, "q75": median * 1.1, "calls": 9}
    return {"status": status, "seconds": seconds, "largest_error": 1e-6, "first_call_seconds": 0.1} | more


def run_of(*raced, left_out=()):
    """A run of problems, each with the ratio to cuDNN."""
    run = {
        "format": 1, "date": "2030-01-02T03:04:05+00:00", "card": "A card", "driver": "for CUDA 13.0", "tier": "fast",
        "versions": {"torch": "2.13.0"}, "ceilings": CEILINGS, "problems": [], "left_out": [],
    }  # fmt: skip
    chosen = [problem for problem, _ in raced]
    providers = {
        problem: {"fastsepconv": entry(), "cuDNN": entry(median=2e-4 * ratio, ratio={"ratio": ratio})}
        for problem, ratio in raced
    }
    cuda.race_all(run, chosen, 60, lambda problem: providers[problem], lambda record: None)
    run["left_out"] += left_out
    return run


def test_every_layer_of_xception_is_raced_in_every_way():
    found = Counter((p.op, p.mode, p.batch, p.numbers) for p in cuda_problems.problems())
    shapes, images = len(XCEPTION), len({(layer.size, layer.channels) for layer in XCEPTION})
    for numbers in cuda_problems.NUMBERS:
        assert found["separable", FORWARD, 32, numbers] == found["separable", BOTH, 32, numbers] == shapes == 10
        assert found["pointwise", FORWARD, 32, numbers] == found["pointwise", FORWARD, 128, numbers] == shapes
    for mode in (FORWARD, BACKWARD):
        assert {numbers: found["depthwise", mode, 32, numbers] for numbers in cuda_problems.NUMBERS} == {
            "float32": images, "tf32": 0, "bfloat16": images,
        }  # fmt: skip
    names = [problem.name for problem in cuda_problems.problems()]
    assert len(set(names)) == len(names) == sum(found.values())


def test_the_whole_network_predicts_and_trains_in_float32_and_bfloat16():
    found = [(p.size, p.mode, p.numbers, p.batch) for p in cuda_problems.problems() if p.op == "network"]
    modes, numbers = ("predict", "train"), ("float32", "bfloat16")
    assert sorted(found) == sorted((299, mode, each, 32) for mode in modes for each in numbers)
    aims = {p.numbers: cuda_report.aim(p.group) for p in cuda_problems.problems() if p.op == "network"}
    assert aims == {"float32": (1.2, None), "bfloat16": (1.0, None)}


def test_networks_that_cannot_be_raced_are_told():
    run = run_of((MIDDLE, 1.5)) | {"no_networks": "Keras is not installed"}
    assert "No whole network was raced: Keras is not installed." in cuda_report.markdown(run)


def test_what_the_host_takes_is_told():
    network = cuda_problems.CudaNetwork("predict", "bfloat16")
    run = {"problems": [], "left_out": []}
    ours, stock = entry(median=2e-2, host_seconds=1.5e-2), entry(median=3e-2, ratio={"ratio": 1.5}, host_seconds=9e-3)
    cuda.race_all(run, [network], 60, lambda problem: {"fastsepconv": ours, "stock layers": stock}, lambda record: None)
    (record,) = run["problems"]
    line = cuda_report.problem_line(record, CEILINGS)
    assert line.startswith("xception 299 predict, bfloat16, batch 32 [") and "20000 us" in line
    assert "the host 15000 us; stock layers 30000 us (27000 - 33000), the host 9000 us, 1.50x" in line


def test_a_network_that_fails_does_not_end_a_race():
    run, failed = {"problems": [], "left_out": []}, entry("failed")
    chosen = [cuda_problems.CudaNetwork("train", "float32"), MIDDLE, MIDDLE]
    cuda.race_all(run, chosen, 60, lambda problem: {"fastsepconv": failed, "others": failed}, lambda record: None)
    assert len(run["problems"]) == 2 and run["left_out"] == [MIDDLE.name]


def test_a_quick_race_keeps_the_separable_convolutions_and_some_of_the_others():
    quick, whole = cuda_problems.problems(quick=True), cuda_problems.problems()
    assert set(quick) < set(whole) and len(quick) < 100
    assert {p.op for p in quick} == {"separable", "network", "pointwise", "depthwise"}
    assert [p.name for p in quick if p.batch != 32] == [
        f"pointwise 19x19x728-728 batch128 forward {numbers}" for numbers in cuda_problems.NUMBERS
    ]
    assert sum(p.op == "separable" for p in quick) == sum(p.op == "separable" for p in whole)


def test_operations_and_bytes():
    pixels = 32 * 19 * 19
    assert MIDDLE.flops == 2 * pixels * (9 * 728 + 728 * 728)
    assert MIDDLE.least_bytes == 4 * pixels * 2 * 728
    half = CudaProblem("depthwise", 19, 728, 728, 32, BACKWARD, "bfloat16")
    assert half.flops == 2 * 2 * pixels * 9 * 728
    assert half.least_bytes == 2 * pixels * 3 * 728
    both = CudaProblem("pointwise", 10, 3, 5, 2, BOTH, "float32")
    assert both.flops == 3 * 2 * 200 * 15 and both.least_bytes == 4 * 200 * (3 + 5 + 3 + 3 + 5)


def test_every_group_has_an_aim():
    aims = {problem.group: cuda_report.aim(problem.group) for problem in cuda_problems.problems()}
    assert all(aims.values())
    for batch in (32, 128):
        assert aims[f"pointwise forward, float32, batch {batch}"] == (1.5, None)
        assert {aims[f"pointwise forward, {numbers}, batch {batch}"] for numbers in ("bfloat16", "tf32")} == {
            (0.6, 0.8)
        }
    assert aims["depthwise forward, bfloat16, batch 32"] == (1.2, None)
    assert aims["depthwise backward, float32, batch 32"] == (2.0, None)
    assert [aims[f"separable forward, {numbers}, batch 32"] for numbers in cuda_problems.NUMBERS] == [
        (1.4, None), (0.9, 1.1), (1.1, 1.3),
    ]  # fmt: skip
    assert aims["separable forward+backward, tf32, batch 32"] == (1.3, None)
    assert cuda_report.aim("something else") is None


@pytest.mark.parametrize("quick", [False, True])
def test_one_of_each_group_is_raced_before_the_rest(quick):
    """So that a race whose time is over has no row of the table without a ratio."""
    found = cuda_problems.problems(quick)
    groups = {problem.group for problem in cuda_problems.problems()}
    first = found[: len(groups)]
    assert {problem.group for problem in first} == groups and len(groups) == 3 * 2 + 2 * 2 + 3 * 2 + 4
    layers = [problem for problem in first if problem.op != "network"]
    assert {(layer.size, layer.channels, layer.filters) for layer in layers} == {(19, 728, 728)}
    assert first[: len(layers)] == layers, "networks take long"


def test_ratios_are_the_others_times_over_ours():
    ours, theirs = [[1e-3, 1e-3], [1e-3, 1e-3]], [[2e-3, 2e-3], [3e-3, 3e-3]]
    right = {"fastsepconv": {"status": "right"}, "cuDNN": {"status": "right"}, "cuBLAS": {"status": "wrong"}}
    found = cuda.timed(right, {"fastsepconv": ours, "cuDNN": theirs})
    assert found["cuDNN"]["ratio"]["ratio"] == pytest.approx(2.5) and found["cuDNN"]["status"] == "timed"
    assert "ratio" not in found["fastsepconv"] and found["cuBLAS"] == {"status": "wrong"}
    alone = cuda.timed({"cuDNN": {"status": "right"}}, {"cuDNN": theirs})
    assert "ratio" not in alone["cuDNN"]


def test_the_time_ends_a_race_and_what_was_left_out_is_told():
    run = {"problems": [], "left_out": []}
    chosen = cuda_problems.problems()[:3]
    cuda.race_all(run, chosen, -1, lambda problem: {}, lambda record: None)
    assert run == {"problems": [], "left_out": [problem.name for problem in chosen]}


def test_what_is_left_out_is_known_at_each_moment():
    """A race that is ended from outside has saved it."""
    run, left = {"problems": [], "left_out": []}, []
    chosen = cuda_problems.problems()[:3]
    right = {"fastsepconv": entry(), "cuDNN": entry()}
    cuda.race_all(run, chosen, 60, lambda problem: right, lambda record: left.append(list(run["left_out"])))
    names = [problem.name for problem in chosen]
    assert left == [names[1:], names[2:], []] and run["left_out"] == []


def test_an_interrupted_race_tells_what_it_knows(monkeypatch, tmp_path, capsys):
    begun = run_of() | {"card": "A card", "no_networks": None}
    right = {"fastsepconv": entry(), "cuDNN": entry(median=4e-4, ratio={"ratio": 2.0})}
    results = [right]

    def one(problem, seconds):
        if not results:
            raise KeyboardInterrupt
        return results.pop()

    monkeypatch.setattr(cuda, "obstacle", lambda: None)
    monkeypatch.setattr(cuda, "begin", lambda: begun)
    monkeypatch.setattr(cuda, "race_one", one)
    assert cuda.main(["--quick", "--folder", str(tmp_path / "new")]) == cuda.CHECK_FAILED
    said = capsys.readouterr().out
    left = len(cuda_problems.problems(quick=True)) - 1
    assert "Interrupted." in said and f"No time was left for {left} problems: " in said and "2.00 |" in said
    saved = json.loads((tmp_path / "new" / "cuda-a-card.json").read_text())
    assert len(saved["problems"]) == 1 and len(saved["left_out"]) == left and saved["interrupted"]


def test_a_card_that_is_lost_ends_a_race():
    run, asked = {"problems": [], "left_out": []}, []

    def one(problem):
        asked.append(problem)
        return {"fastsepconv": entry("failed"), "cuDNN": entry("failed" if len(asked) == 2 else "wrong")}

    chosen = cuda_problems.problems()[:4]
    cuda.race_all(run, chosen, 60, one, lambda record: None)
    assert asked == chosen[:2] and run["left_out"] == [problem.name for problem in chosen[2:]]


def test_the_table_tells_means_aims_and_losses():
    other = CudaProblem("separable", 10, 1536, 2048, 32, FORWARD, "tf32")
    run = run_of((MIDDLE, 0.5), (other, 2.0), left_out=["something"])
    run["problems"][0]["providers"]["torch.compile"] = entry("failed")
    said = cuda_report.markdown(json.loads(json.dumps(run)))
    assert "Measured on A card (driver for CUDA 13.0); copies at 4.00 TB/s; products at 50 TFLOP/s (float32)" in said
    row = next(line for line in said.splitlines() if line.startswith("| separable forward, tf32, batch 32 |"))
    assert "| 1.00 (1 of 2 lost) | - | 0.9x | 1.1x |" in row and "| aim | aim with wgmma |" in said
    assert f"- {MIDDLE.name}: 0.50x cuDNN" in said and f"- {other.name}" not in said
    assert f"- {MIDDLE.name}: torch.compile failed, for a reason" in said
    assert "No time was left for 1 problems: something." in said


def test_a_race_without_losses_says_so():
    assert "No race of 1 was lost." in cuda_report.markdown(run_of((MIDDLE, 1.5)))


def test_a_line_a_problem():
    (record,) = run_of((MIDDLE, 0.5))["problems"]
    line = cuda_report.problem_line(record, CEILINGS)
    least = max(MIDDLE.flops / 4e14, MIDDLE.least_bytes / 4e12)
    assert line.startswith(f"{MIDDLE.name} [{100 * least / 2e-4:.0f} % of what the card can do]: fastsepconv 200 us")
    assert line.endswith("cuDNN 100 us (90 - 110), 0.50x LOSS")
    record["providers"]["fastsepconv"] = entry("wrong")
    assert "fastsepconv wrong (for a reason)" in cuda_report.problem_line(record, CEILINGS)


def test_a_saved_run_is_printed_again(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_of((MIDDLE, 0.5))))
    assert cuda_report.main([str(file)]) == 0
    assert "Losses, 1 of 1 races" in capsys.readouterr().out


README = Path(__file__).parents[2] / "README.md"
MARKERS = cuda_report.BEGIN, cuda_report.END


def test_the_readme_says_what_the_kept_races_say():
    begin, end = MARKERS
    runs = [json.loads(file.read_text()) for file in cuda_report.kept()]
    assert README.read_text().split(begin)[1].split(end)[0] == "\n" + cuda_report.readme_part(runs)


def test_kept_races_become_the_readmes_table_a_part_for_each_card(tmp_path, monkeypatch, capsys):
    begin, end = MARKERS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(cuda_report, "kept", lambda kept=cuda_report.kept: kept(tmp_path))

    def written() -> str:
        assert cuda_report.main(["--readme", str(readme)]) == 0
        before, part, after = re.split(f"{begin}|{end}", readme.read_text())
        assert (before, after) == ("before\n", "\nafter\n")
        return part

    (tmp_path / "cuda-status.json").write_text("{}")
    assert written() == "\n" + cuda_report.NO_RACE
    for card in ("A card", "Other card"):
        run = run_of((MIDDLE, 0.5)) | {"card": card}
        (tmp_path / f"cuda-{cuda._slug(card)}.json").write_text(json.dumps(run))
    part = written()
    assert cuda_report.NO_RACE not in part and part.count("| separable forward, tf32, batch 32 |") == 2
    assert part.index("Measured on A card") < part.index("Measured on Other card")
    assert capsys.readouterr().out == ""


def test_the_readme_is_told_the_worst_losses_and_how_many_there_are():
    run = run_of(*((problem, 0.5 + i / 100) for i, problem in enumerate(LAYERS)), left_out=list("abcdefghijklmn"))
    run["problems"][0]["providers"] |= {f"provider {i}": entry("failed") for i in range(13)}
    part = cuda_report.readme_part([run])
    assert f"Losses, {len(LAYERS)} of {len(LAYERS)} races, the worst 12 of them:" in part
    assert f"- {LAYERS[0].name}: 0.50x cuDNN" in part and f"- {LAYERS[-1].name}" not in part
    assert "Not timed, 13, the first 12 of them:" in part and "provider 12" not in part.split("Not timed")[1]
    assert "No time was left for 14 problems: a, b, c, d, e, f, g, h, i, j, k, l and others." in part
    assert f"- {LAYERS[-1].name}" in cuda_report.markdown(run)


def test_the_file_is_named_after_the_card():
    assert cuda._slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


@pytest.mark.skipif(nvidia.obstacle() is None, reason="there is a card here")
def test_without_a_card_it_is_said_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "fastsepconv.bench.cuda", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == cuda.MISSING == console.NOT_INSTALLED
    assert done.stdout == "" and done.stderr.startswith("The CUDA kernels cannot be raced here: ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(".\n")


def test_exit_codes_are_the_command_lines():
    assert (cuda.OK, cuda.CHECK_FAILED) == (console.OK, console.CHECK_FAILED)
