"""What the report says of a run whose numbers are known."""

from __future__ import annotations

import json

import pytest

from fastsepconv.bench import figure, instrument, race, report, results
from fastsepconv.cli import main
from fastsepconv.cli.console import CHECK_FAILED, OK

PEAK = 500.0


def timed(milliseconds, gflop, ratio=None):
    seconds = milliseconds / 1e3
    entry = {
        "status": "timed",
        "largest_error": 1e-6,
        "first_call_seconds": 0.5,
        "seconds": {"median": seconds, "q25": 0.9 * seconds, "q75": 1.1 * seconds, "calls": 100},
        "round_medians": [seconds],
        "gflops": gflop / seconds,
    }
    return entry if ratio is None else entry | {"times_baseline": {"ratio": ratio, "q25": ratio, "q75": ratio}}


def layer(size, tensorflow_ratio, others_share=0.0):
    gflop = 0.4
    return {
        "suite": "xception", "size": size, "channels": 728, "filters": 728, "batch": 1, "mode": "forward",
        "op": "separable", "uses": 25, "weight_sets": 1, "name": f"xception/{size}x{size}x728-728/batch1/forward",
        "flops": gflop * 1e9, "others_share": others_share, "error_bound": 5e-5,
        "providers": {
            "fastsepconv": timed(1.0, gflop),
            "tensorflow": timed(tensorflow_ratio, gflop, tensorflow_ratio),
            "torch": {"status": "absent", "reason": "No module named 'torch'"},
            "openvino": {"status": "wrong", "reason": "the error of y is 1e-01, above 5e-05", "largest_error": 0.1},
            "fastsepconv-arrays": timed(0.5, gflop, 0.5),
        },
    }  # fmt: skip


def network():
    return {
        "suite": "tutorial", "batch": 64, "mode": "train", "op": "network", "name": "tutorial-network/batch64/train",
        "flops": 1e11, "others_share": 0.0, "error_bound": 2e-2,
        "providers": {"fastsepconv": timed(300.0, 100.0), "tensorflow": timed(360.0, 100.0, 1.2)},
    }  # fmt: skip


@pytest.fixture
def run():
    return {
        "format": results.FORMAT,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "Test CPU", "cores": 2, "features": ["avx2", "fma"], "caches": {"L1": "48K"},
                    "system": "Linux 6", "python": "3.12.1"},
        "threads": 2,
        "seed": 0,
        "peak_gflops": {"1": PEAK / 2, "2": PEAK},
        "budget": {"seconds": 1.0, "rounds": 8},
        "versions": {"tensorflow": {"tensorflow": "2.21.0"}},
        "absent": {"torch": "No module named 'torch'"},
        "baseline": "fastsepconv",
        "problems": [layer(19, 1.6), layer(10, 0.9, others_share=0.2), network()],
    }  # fmt: skip


def test_a_loss_is_printed_as_loudly_as_a_win(run):
    text = report.markdown(run)
    assert "| xception layers, batch 1, forward | 80 - 80 % | 1.20 (1 of 2 lost) |" in text
    assert "Losses, 1 of 3 races:\n\n- xception 10x10x728-728 batch1 forward: 0.90x TensorFlow graph" in text


def test_without_losses_it_says_so(run):
    run["problems"].pop(1)
    assert "Losses: none in 2 races." in report.markdown(run)


def test_the_array_functions_take_no_part_in_ratios(run):
    text = report.markdown(run)
    assert "NumPy arrays" not in text
    assert "fastsepconv, NumPy arrays" in report.details(run)


def test_freeze_is_set_against_those_whose_weights_are_constants_too(run):
    assert "weights constant" not in report.markdown(run)
    prediction = network() | {"mode": "predict", "name": "tutorial-network/batch64/predict"}
    others = {"onnxruntime": timed(250.0, 100.0, 0.8), "openvino": timed(150.0, 100.0, 0.5)}
    prediction["providers"] |= others | {"fastsepconv-frozen": timed(200.0, 100.0, 0.67)}
    run["problems"].append(prediction)
    for text in (report.markdown(run), report.details(run)):
        assert "| weights constant | fastsepconv.freeze | x ONNX Runtime | x OpenVINO |" in text
        assert "| tutorial-network batch64 predict | 200 ms | 1.25x | **0.75x** |" in text


def test_details_have_every_problem_with_its_times_and_refusals(run):
    text = report.details(run)
    assert "| 19x19x728-728 (x25) | 1.00 ms, 80 % | 1.60 ms, 1.60x | 0.500 ms, 0.50x |" in text
    assert "| tutorial-network batch64 train | 300 ms, 67 % | 360 ms, 1.20x |" in text


def test_the_machine_is_named(run):
    line = report.markdown(run).splitlines()[0]
    for fact in ("Test CPU, 2 cores (avx2, fma; L1 48K)", "2 threads", "500 GFLOP/s (2)", "tensorflow 2.21.0"):
        assert fact in line


def test_terminal_lines_tell_shares_losses_and_disturbance(run):
    lines = list(report.problem_lines(run["problems"][1], run))
    assert any("80 % of peak" in line for line in lines)
    assert any(line.startswith("  tensorflow ") and line.endswith("0.90x (0.90 - 0.90)  LOSS") for line in lines)
    assert any("fastsepconv-arrays" in line and line.endswith("apart") for line in lines)
    assert "  disturbed: other processes used 20 % of the machine meanwhile" in lines
    assert any("openvino" in line and "wrong: the error of y" in line for line in lines)


def test_summary_lines_give_geometric_means_and_refusals(run):
    lines = list(report.summary_lines(run))
    assert "fastsepconv is 1.20x as fast as tensorflow (geometric mean of 2, lowest 0.90x, 1 lost)" in lines[0]
    assert sum("openvino not timed" in line for line in lines) == 2


def test_the_readme_keeps_what_stands_around_the_markers(run):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    changed = report.put_between_markers(text, "new\n")
    assert changed == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.put_between_markers(changed, "new\n") == changed


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN * 2}{report.END}"])
def test_a_readme_without_markers_is_left_alone(text):
    with pytest.raises(ValueError, match="Invalid value for argument `readme`"):
        report.put_between_markers(text, "new")


def test_a_saved_run_comes_back(run, tmp_path):
    results.save(run, tmp_path / "run.json")
    again = results.load(tmp_path / "run.json")
    assert again.keys() == run.keys()
    seconds = [run["problems"][2]["providers"]["tensorflow"]["seconds"] for run in (run, again)]
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-5)
    assert report.markdown(again) == report.markdown(run)


COMMIT = {"commit": "0123456789abcdef", "changed": False}


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([COMMIT], "; commit 0123456; "),
        ([COMMIT, COMMIT], "; commit 0123456; "),
        ([COMMIT, COMMIT | {"changed": True}], "; commit 0123456 and 0123456 with changes; "),
        ([COMMIT, None], "; commit 0123456 and one not recorded; "),
    ],
)
def test_the_commits_are_named(run, codes, words):
    assert words in report.markdown(results.merge([run | {"code": code} for code in codes])).splitlines()[0]


def test_runs_of_before_commits_were_recorded_say_nothing_of_them(run):
    for runs in ([run], [run, run | {"code": None}]):
        assert "commit" not in report.markdown(results.merge(runs))


def checks_of(run, *ratios):
    checks = [instrument.Check(f"problem {ratio}: tensorflow against itself", ratio, 0.03) for ratio in ratios]
    return results.checked(checks, run["threads"], race.Budget()) | {"machine": run["machine"]}


def test_the_check_of_the_instrument_has_a_sentence_under_the_tables(run):
    text = report.markdown(results.merge([run, checks_of(run, 0.99, 1.012)]))
    sentence = "a race over its time alone: 0.990 to 1.012, all 2 passed."
    assert text.index("tutorial-network") < text.index(sentence) < text.index("Losses, ")
    text = report.markdown(results.merge([checks_of(run, 0.99, 1.04), run]))
    assert "0.990 to 1.040, 1 of 2 failed (problem 1.04: tensorflow against itself 1.040)." in text
    assert "instrument" not in report.markdown(results.merge([run]))


def test_a_check_of_another_machine_or_without_a_race_is_refused(run):
    check = checks_of(run, 1.0)
    with pytest.raises(ValueError, match="Expected the same machine in all"):
        results.merge([run, check | {"machine": {"cpu": "another"}}])
    with pytest.raises(ValueError, match="Expected a race"):
        results.merge([check])


def test_what_a_check_found_is_saved_and_decides_the_exit_code(tmp_path, monkeypatch, capsys):
    for ratio, code in ((1.0, OK), (1.04, CHECK_FAILED)):
        found = [instrument.Check("a problem: tensorflow against itself", ratio, 0.03)]
        monkeypatch.setattr(instrument, "check", lambda *arguments, found=found: found)
        assert main(["bench", "--check", "--save", str(tmp_path / "check.json"), "--json", "--threads", "2"]) == code
        document = results.load(tmp_path / "check.json")
        assert json.loads(capsys.readouterr().out) == document
        assert document["checks"] == [vars(found[0]) | {"passed": code == OK}]
        assert (document["threads"], document["budget"]["rounds"]) == (2, 8) and "cpu" in document["machine"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 0}'])
def test_what_is_no_run_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="Invalid value for argument `run`"):
        results.load(tmp_path / "run.json")


def test_the_report_program_writes_all_that_it_is_asked_for(run, tmp_path, capsys):
    results.save(run, tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["--readme", str(readme), "--details", str(tmp_path / "d.md"), "--figures", str(tmp_path / "figures")]
    assert report.main([str(tmp_path / "run.json"), *arguments]) == 0
    assert "Test CPU" in readme.read_text() and "19x19x728-728" in (tmp_path / "d.md").read_text()
    assert capsys.readouterr().out.split() == [str(tmp_path / "figures" / "xception.png")]
    assert (tmp_path / "figures" / "xception.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_machine_are_merged(run):
    other = run | {"problems": [network()], "peak_gflops": {"1": 240.0, "2": PEAK + 20}}
    merged = results.merge([run, other])
    assert len(merged["problems"]) == 4 and merged["peak_gflops"] == {"1": PEAK / 2, "2": PEAK + 20}
    assert len(run["problems"]) == 3, "the runs themselves should be left alone"


def test_runs_of_two_machines_are_kept_apart(run):
    with pytest.raises(ValueError, match="Expected the same threads in all"):
        results.merge([run, run | {"threads": 1}])


def test_of_runs_that_are_merged_some_may_be_of_before_copying_was_measured(run):
    told, again = (run | {"copy_gbytes": rates} for rates in ({"1": 30.0, "2": 40.0}, {"1": 31.0, "2": 39.0}))
    assert "copy_gbytes" not in results.merge([run, run])
    assert results.merge([run, told])["copy_gbytes"] == results.merge([told, run])["copy_gbytes"] == told["copy_gbytes"]
    assert results.merge([told, run, again])["copy_gbytes"] == {"1": 31.0, "2": 40.0}


def depthwise(shape, bytes_moved):
    record = layer(74, 1.6) | {"suite": "depthwise", "op": "depthwise", "bytes_moved": bytes_moved}
    return record | {"channels": 256, "filters": 256, "uses": 1, "name": f"depthwise/{shape}/batch1/forward"}


@pytest.fixture
def depthwise_run(run):
    """Ours takes 1 ms, and the machine copies 40 MB in it."""
    problems = [depthwise("74x74x256", 10_000_000), depthwise("74x74x256,5x5,stride2", 48_000_000)]
    return run | {"problems": [layer(19, 1.6), *problems], "copy_gbytes": {"1": 30.0, "2": 40.0}}


def test_depthwise_layers_are_held_against_copying(depthwise_run):
    text = report.markdown(depthwise_run)
    assert "| depthwise layers, batch 1, forward | 25 - 120 % of copy | 1.60 |" in text
    assert "| xception layers, batch 1, forward | 80 - 80 % | 1.60 |" in text
    assert "; copies at 30 GB/s (1), 40 GB/s (2); " in text
    assert "| 74x74x256,5x5,stride2 | 1.00 ms, 120 % of copy | 1.60 ms, 1.60x |" in report.details(depthwise_run)
    lines = list(report.problem_lines(depthwise_run["problems"][1], depthwise_run))
    assert any(line.startswith("  fastsepconv ") and " 25 % of copy  first call" in line for line in lines)
    assert any(line.startswith("  tensorflow ") and " 16 % of copy  first call" in line for line in lines)


def test_depthwise_layers_of_before_copying_was_measured_are_held_against_the_peak(depthwise_run):
    del depthwise_run["copy_gbytes"]
    for text in (report.markdown(depthwise_run), report.details(depthwise_run)):
        assert "80 %" in text and "cop" not in text


def test_no_two_problems_of_a_picture_have_the_same_label(depthwise_run):
    labels = [figure._tick(record) for record in depthwise_run["problems"]]
    assert labels == ["19x19\n728 to 728", "74x74\n256", "74x74\n256\n5x5\nstride2"]


def test_many_losses_are_counted_in_the_readme_and_told_in_the_details(run):
    run["problems"] = [layer(size, 0.5) for size in range(10, 30)]
    text = report.markdown(run)
    assert "Losses, 20 of 20 races, the worst 12 of them:" in text and text.count("\n- ") == 12
    assert report.details(run).count("\n- ") == 20


def test_the_report_program_says_what_is_wrong(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.json")]) == 3
    assert "none.json" in capsys.readouterr().err


def test_error_bars_follow_the_quartiles_of_the_times():
    entry = timed(1.0, 0.4)
    assert figure._distance(entry, "q25") == pytest.approx(400 / 0.9 - 400)
    assert figure._distance(entry, "q75") == pytest.approx(400 - 400 / 1.1)
