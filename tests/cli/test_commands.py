"""What all commands have in common."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

import pytest

from fastsepconv import cli
from fastsepconv.cli import console


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = cli.parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


def test_the_commands_are_those_that_are_promised():
    assert set(subcommands()) == {"demo", "train", "predict", "bench", "verify", "convert", "doctor"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples_exit_codes_and_the_common_options(command):
    text = subcommands()[command].format_help()
    assert f"fastsepconv {command}" in text.split("examples:")[1]
    assert "exit codes:" in text
    assert "--json" in text and "--seed" in text


def test_building_the_parser_imports_nothing_heavy():
    code = (
        "import sys; from fastsepconv.cli import parser; parser();"
        "print({'tensorflow', 'keras', 'numba', 'rich', 'matplotlib', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_module_and_script_are_the_same_program():
    run = subprocess.run([sys.executable, "-m", "fastsepconv", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: fastsepconv ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "--seed", "-1"],
        ["train", "--epochs", "0"],
        ["train", "--epochs", "two"],
        ["train", "--momentum", "1"],
        ["train", "--learning-rate", "nan"],
        ["train", "--data", "a", "--csv", "b"],
        ["predict", "a.png"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == console.USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys, images):
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else present(name))
    assert cli.main(["train", "--data", str(images)]) == console.NOT_INSTALLED
    message = capsys.readouterr().err
    assert "rich" in message and "pip install" in message and message.count("\n") == 1


def test_json_has_no_word_that_json_lacks(capsys):
    console.Console(json_only=True).document({"loss": [1.0, float("nan")], "pair": (float("inf"), 2)})
    out = capsys.readouterr().out
    assert "NaN" not in out and "Infinity" not in out and out.count("null") == 2
