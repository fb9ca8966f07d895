"""Errors that nobody expected, interruptions, and paths that were meant."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastkd.cli import main as cli
from fastkd.cli.commands import COMMANDS, Inspect, Train
from fastkd.errors import TrainError


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    def broken(error: BaseException) -> None:
        def fail(command: object) -> None:
            raise error

        monkeypatch.setitem(cli._COMMANDS, Inspect, fail)

    return broken


def test_an_unexpected_error_is_one_sentence(broken: Any, capfd: pytest.CaptureFixture[str]) -> None:
    broken(ValueError("two\nlines."))
    assert cli.main(["inspect", "c"]) == 1
    sentence = "`fastkd inspect` failed unexpectedly: ValueError: two lines. FASTKD_TRACEBACK=1 shows the traceback."
    assert capfd.readouterr() == ("", f"fastkd: {sentence}\n")
    assert cli.main(["inspect", "c", "--json"]) == 1
    assert json.loads(capfd.readouterr().out) == {"error": sentence}
    broken(KeyError())
    assert cli.main(["inspect", "c"]) == 1
    assert "failed unexpectedly: KeyError. FASTKD" in capfd.readouterr().err


def test_its_traceback_is_shown_if_wanted(
    broken: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTKD_TRACEBACK", "1")
    broken(ValueError("s3://me:hunter2@bucket/x"))
    assert cli.main(["inspect", "c"]) == 1
    told = capfd.readouterr().err
    assert told.startswith("Traceback (most recent call last):")
    assert "in fail" in told
    assert told.endswith("ValueError: s3://…@bucket/x. This is a fault in fastkd.\n")
    monkeypatch.setenv("FASTKD_TRACEBACK", "0")
    assert cli.main(["inspect", "c"]) == 1
    assert "Traceback (" not in capfd.readouterr().err


def test_an_interruption_anywhere(
    broken: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(KeyboardInterrupt())
    assert cli.main(["inspect", "c"]) == 130

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parsed", interrupt)
    assert cli.main(["inspect", "c"]) == 130
    assert capfd.readouterr() == ("", 2 * "fastkd: interrupted\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_for_a_reader_that_has_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastkd sweep --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        assert cli.main([name, "-h"]) == 0
        assert cli.main(["--help"]) == 0


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "cahce"],
        ["verify", "cahce"],
        ["train", "--student", "s", "--cache", "cahce", "--out", "o"],
        ["capture", "--teacher", "../{here}/techer", "--data", "text.txt", "--out", "o"],
        ["capture", "--teacher", "teacher", "--data", "text.tx", "--out", "o"],
        ["report", "rn"],
    ],
    ids=" ".join,
)
def test_a_path_that_is_not_there_names_the_one_beside_it(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("cache", "teacher", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main([word.format(here=tmp_path.name) for word in args]) in (1, 2)
    told = capfd.readouterr().err
    (asked,) = [line for line in told.splitlines() if "Did you mean " in line]
    meant = asked.partition("Did you mean ")[2].rstrip("?")
    assert (tmp_path / meant).exists()
    assert "hf download" not in told


def test_a_word_that_is_no_path_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A default ("pack"), a choice ("padded"), and a part of another word ("c")."""

    def fail(command: object, stop: object) -> None:
        raise TrainError("got a packed micro-batch; expected padded ones.")

    monkeypatch.setitem(cli._LONG, Train, fail)
    for name in ("packed", "paded", "ca"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--student", "m:f", "--cache", "c", "--out", "o", "--layout", "padded"]) == 1
    assert capfd.readouterr().err == "fastkd: got a packed micro-batch; expected padded ones.\n"
