"""What is typed: spellings, values that cannot be, and what was meant."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.cli import main as cli
from fastkd.cli.commands import COMMANDS
from fastkd.cli.options import HelpWanted, UsageError, arguments, options_of, scan
from fastkd.cli.parse import parse

NEEDED = ["train", "--student", "s", "--cache", "c", "--out", "o"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--raet", "3"], "--raet: `fastkd train` has no such option. Did you mean --rate?"),
        (["--batch=3"], "--batch: `fastkd train` has no such option. Did you mean --batch-tokens or --batch-size?"),
        (["--learning-rat", "3"], "Did you mean --learning-rate or --learning-rate-schedule?"),
        (["--quantise", "int8"], "Did you mean --quantize"),
        (["--confg", "x.toml"], "Did you mean --config?"),
        (["--price-per-hour", "3"], "has no such option. It is one of `fastkd plan`."),
        (["--xyzzy"], "--xyzzy: `fastkd train` has no such option. `fastkd train --help` lists all."),
        (["--rate-schedule", "cosin"], "--rate-schedule: got 'cosin'; expected one of cosine, wsd, linear, constant."),
        (["--rate-schedule", "cosin"], "Did you mean cosine?"),
        (["--steps", "1e4"], "--steps: got '1e4'; expected an integer."),
        (["--lr", "fast"], "--lr: got 'fast'; expected a number."),
        (["--steps"], "--steps: got no value; expected one."),
        (["--adam-betas", "0.9"], "--adam-betas: got 1 values; expected 2."),
        (["--control=yes"], "--control: got the value 'yes'; expected none."),
        (["cache"], "cache: got a word that belongs to no option; expected `fastkd train` and options"),
    ],
)
def test_usage_errors_say_what_was_meant(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*NEEDED, *args]) == 2
    out, told = capfd.readouterr()
    assert out == ""
    assert told.startswith("fastkd: ")
    assert told.count("\n") == 1
    assert message in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["capure"], "capure: no such command. Did you mean capture? `fastkd --help` lists them."),
        (["deploy_report"], "Did you mean deploy-report?"),
        (["--raet", "3"], "--raet: got an option; expected a command first."),
    ],
)
def test_commands_that_do_not_exist(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    assert message in capfd.readouterr().err


def test_what_is_missing_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--student", "s"]) == 2
    told = capfd.readouterr().err
    assert "--out" in told
    assert "--student" not in told


def test_a_learning_rate_has_several_names() -> None:
    for flag in ("--learning-rate", "--rate", "--lr", "--learning_rate"):
        assert parse([*NEEDED, flag, "0.5"]).rate == 0.5
    assert parse(["sweep", *NEEDED[1:], "--lr", "1", "2", "--rate", "3"]).rate == (1.0, 2.0, 3.0)
    assert parse([*NEEDED, "--lr-schedule", "wsd"]).rate_schedule == "wsd"


def test_errors_of_a_setting_name_the_option_that_was_typed(capfd: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    for flag in ("--lr", "--rate", "--learning-rate"):
        args = ["train", "--student", "s", "--cache", str(tmp_path), "--out", str(tmp_path / "o"), flag, "-1"]
        assert cli.main(args) == 1
        assert capfd.readouterr().err.startswith(f"fastkd: {flag} -1.0: expected a number")


def test_a_positional_argument_may_be_named_as_in_other_commands() -> None:
    assert parse(["inspect", "--cache", "c"]) == parse(["inspect", "c"])
    assert parse(["match", "--cache", "c", "s"]) == parse(["match", "s", "c"])


def test_words_go_to_positional_arguments_in_order() -> None:
    found = scan("deploy-report", ["s", "--threads", "2", "a", "b"]).values
    assert found == {"student": ["s"], "folders": ["a", "b"], "threads": ["2"]}
    assert parse(["report", "--out", "p.html", "a", "b"]).runs == parse(["report", "a", "b", "--out=p.html"]).runs
    with pytest.raises(UsageError, match="b: got a word"):
        scan("inspect", ["a", "b"])


def test_switches_can_be_taken_back() -> None:
    assert scan("train", ["--control", "--no-control"]).values == {"control": ["false"]}
    assert parse([*NEEDED, "--control", "--no-control"]).control is False
    assert parse([*NEEDED, "--no-control", "--control"]).control is True
    needed = ["generations", "2", "--student", "s", "--teacher", "t", "--data", "d", "--out", "o"]
    assert parse([*needed, "--no-ensemble"]).ensemble is False
    assert parse([*needed, "--no-ensemble", "--ensemble"]).ensemble is True


def test_help_is_wanted_wherever_it_stands() -> None:
    for args, brief in ((["--steps", "3", "-h"], True), (["--student", "--help"], False)):
        with pytest.raises(HelpWanted) as wanted:
            scan("train", args)
        assert wanted.value.brief == brief


@pytest.mark.parametrize("name", COMMANDS)
def test_all_fields_are_options_with_values_of_known_kinds(name: str) -> None:
    found = {option.name: option for option in options_of(name)}
    shown = {field.name for field in fields(COMMANDS[name])}
    assert found.keys() == (shown - {"json"} if name == "completion" else shown)
    for option in found.values():
        assert option.types
        assert option.count is None or option.count >= 0
        assert all(re.fullmatch(r"--[a-z0-9-]+", flag) for flag in option.flags)


def test_arguments_have_each_option_once_and_words_first() -> None:
    values = {"runs": ["a", "b"], "out": ["-x"], "png": ["true"], "fetch": ["false"]}
    assert arguments("report", values) == ["a", "b", "--out=-x", "--png"]
    assert arguments("train", {"match": ["-1:8:mse:1", "auto"]}) == ["--match", "-1:8:mse:1", "auto"]


def test_the_entry_point_knows_the_commands_that_can_be_continued() -> None:
    """It handles signals before anything is imported."""
    text = (Path(fastkd.__file__).parent / "__main__.py").read_text()
    (found,) = re.findall(r"^LONG = (\(.*\))$", text, re.M)
    names = {kind: name for name, kind in COMMANDS.items()}
    assert set(ast.literal_eval(found)) == {names[kind] for kind in cli._LONG}
