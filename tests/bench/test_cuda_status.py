"""What the README says of the CUDA kernels follows from what has run on a card, and says so where none has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastsepconv.bench import cuda_status
from fastsepconv.bench.cuda_status import BEGIN, END, FAILED, NEVER, PASSED

README = Path(__file__).parents[2] / "README.md"


def lines(operation="depthwise_forward", tier="plain", dtype="float32", event="passed"):
    line = {"operation": operation, "tier": tier, "dtype": dtype, "card": "A card"}
    return [line | {"event": each} for each in ("begun", event) if each]


def test_the_readme_says_what_the_committed_status_says():
    text = README.read_text()
    assert text.split(BEGIN)[1].split(END)[0] == "\n" + cuda_status.markdown(cuda_status.load())


def test_the_committed_status_knows_every_operation_tier_and_dtype():
    committed, blank = cuda_status.load(), cuda_status.blank()
    assert committed.keys() == blank.keys()
    for operation, tiers in blank["states"].items():
        assert committed["states"][operation].keys() == tiers.keys()
        for tier, states in tiers.items():
            assert committed["states"][operation][tier].keys() == states.keys()
            assert set(committed["states"][operation][tier].values()) <= {PASSED, FAILED, NEVER}
    assert committed["ways"].keys() == blank["ways"].keys() and set(committed["ways"].values()) <= {
        PASSED,
        FAILED,
        NEVER,
    }
    nothing_ran = {s for t in committed["states"].values() for states in t.values() for s in states.values()} == {NEVER}
    assert nothing_ran == (committed["card"] is None)


def test_one_failure_is_enough_and_what_did_not_run_never_did():
    ledger = [*lines(), *lines(event="failed"), *lines(), *lines(dtype="float16"), *lines(dtype="float64", event=None)]
    ledger += [*lines("separable_backward", "fast", "bfloat16"), *lines("pointwise_forward", "fast", event="skipped")]
    status = cuda_status.of_ledger(ledger, "2030-01-02")
    assert status["states"]["depthwise_forward"]["plain"] == {
        "float32": FAILED, "float64": FAILED, "float16": PASSED, "bfloat16": NEVER,
    }  # fmt: skip
    assert status["states"]["separable_backward"]["fast"]["bfloat16"] == PASSED
    assert set(status["states"]["pointwise_forward"]["fast"].values()) == {NEVER}
    assert set(status["ways"].values()) == {NEVER}
    said = cuda_status.markdown(status)
    assert said.startswith("On A card, 2030-01-02; ")
    assert "| depthwise forward | plain | failed | failed | passed | never run on a card |" in said


def test_the_ways_to_the_kernels_have_states_of_their_own():
    events = {"array API": ["begun", "passed", "begun", "skipped"], "Keras on torch": ["begun", "passed", "begun"]}
    ledger = [{"way": way, "event": event, "card": "A card"} for way, told in events.items() for event in told]
    status = cuda_status.of_ledger([*ledger, *lines()], "2030-01-02")
    assert status["ways"] == {"array API": PASSED, "Keras on TensorFlow": NEVER, "Keras on torch": FAILED}
    assert status["states"]["depthwise_forward"]["plain"]["float32"] == PASSED
    assert "| Keras on TensorFlow | never run on a card |" in cuda_status.markdown(status)


def test_every_way_has_tests_on_a_card_that_tell_of_it():
    named = re.compile(r'^WAY_TO_A_CARD = "(.*)"$', re.MULTILINE)
    found = [
        way for file in README.parent.glob("tests/**/test_*on_card*.py") for way in named.findall(file.read_text())
    ]
    assert sorted(found) == sorted(cuda_status.WAYS)


def test_tests_that_name_a_way_write_down_how_it_went(tmp_path):
    """pytest, with the hooks of these tests, on a module whose tests end in each way."""
    (tmp_path / "test_way.py").write_text("""
import pytest
WAY_TO_A_CARD = "some way"
def test_right(): pass
def test_wrong(): assert False
def test_not_here(): pytest.skip("no reason")
@pytest.mark.skip
def test_not_begun(): pass
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    paths = [str(README.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "FASTSEPCONV_CUDA_LEDGER": str(tmp_path / "ledger")}
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "test_way.py"],
        cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    told = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    assert [line["event"] for line in told] == ["begun", PASSED, "begun", FAILED, "begun", "skipped"]
    assert {line["way"] for line in told} == {"some way"}


def test_a_ledger_becomes_the_status_and_the_readmes_table(tmp_path, capsys):
    ledger, file, readme = tmp_path / "ledger.jsonl", tmp_path / "status.json", tmp_path / "README.md"
    ledger.write_text("".join(json.dumps(each) + "\n" for each in (*lines(), *lines(dtype="float64"))))
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--ledger", ledger, "--file", file, "--readme", readme]
    assert cuda_status.main([str(argument) for argument in arguments]) == 0
    said = cuda_status.markdown(cuda_status.load(file))
    assert readme.read_text() == f"before\n{BEGIN}\n{said}{END}\nafter\n" and said in capsys.readouterr().out


def test_without_a_ledger_nothing_is_written(tmp_path, capsys):
    file = tmp_path / "status.json"
    assert cuda_status.main(["--ledger", str(tmp_path / "none"), "--file", str(file)]) == 1
    assert not file.exists() and "No test ran on a card" in capsys.readouterr().err


def test_an_operation_that_nobody_knows_is_an_error():
    with pytest.raises(KeyError, match="shuffle"):
        cuda_status.of_ledger(lines("shuffle"), "2030-01-02")
