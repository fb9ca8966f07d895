"""Errors of the command line speak of flags, not of arguments of Python."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_cases import make_cache

from fastkd.cli import main as cli
from fastkd.cli.flags import flags, in_flags
from fastkd.cli.parse import parse

NAMES = ("held_out", "k", "rate", "rank", "world_size", "export", "column", "loss_on", "allow_partial", "max_positions")
FLAGS = {name: "--" + name.replace("_", "-") for name in NAMES}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("held_out: got 1.5; expected a fraction.", "--held-out 1.5: expected a fraction."),
        ("export: got 'mean'; expected one of last, best.", "--export mean: expected one of last, best."),
        ("rate: got -1e-05; expected a number.", "--rate -1e-05: expected a number."),
        ("held_out: got 0.5 of 1 document; expected two.", "--held-out: got 0.5 of 1 document; expected two."),
        (
            "rank, world_size: got 1 and None; expected both.",
            "--rank, --world-size: got 1 and None; expected both.",
        ),
        ("rank: found 3 of a world_size of 2; less.", "--rank: found 3 of a --world-size of 2; less."),
        ("x is missing. Use export='last'.", "x is missing. Use --export last."),
        ('found text, with loss_on="assistant"; only', "found text, with --loss-on assistant; only"),
        ("Read what is there with allow_partial=True.", "Read what is there with --allow-partial."),
        ("which column? Name one with column=.", "which column? Name one with --column."),
        ("keep some of it apart with max_positions.", "keep some of it apart with --max-positions."),
        (
            "s: another (there, and now: k: 8 and 9; rate: 1 and 2). Write elsewhere.",
            "s: another (there, and now: --k: 8 and 9; --rate: 1 and 2). Write elsewhere.",
        ),
        (
            "begun with other settings (rate: 1 there, 2 here; k: 3 there, 4 here)",
            "begun with other settings (--rate: 1 there, 2 here; --k: 3 there, 4 here)",
        ),
    ],
)
def test_settings_are_called_by_their_flags(said: str, shown: str) -> None:
    assert in_flags(said, FLAGS) == shown
    assert in_flags(said, {}) == said


@pytest.mark.parametrize(
    "said",
    [
        "/data/k=5/held_out/a.parquet: there is no such file.",
        "sweep/k=0,rate=0.01/rank=0: it was trained with another student",
        "k=0,rate=0.01: diverged, the others go on.",
        "/x: got 'held_out'; expected an empty folder, a new one, or that of a run.",
        "the rate at which k grows: found none",
        "other_setting: got 3; expected less.",
    ],
)
def test_all_else_stays(said: str) -> None:
    assert in_flags(said, FLAGS) == said


@given(st.text())
def test_any_text_can_be_an_error(text: str) -> None:
    assert isinstance(in_flags(text, FLAGS), str)
    assert in_flags(in_flags(text, {}), {}) == text


def test_the_flags_of_a_command() -> None:
    found = flags("capture")
    assert found["held_out"] == "--held-out"
    assert found["text_documents"] == "--text-documents"
    options = ("sample", "tokenizer", "classes", "json")
    assert flags("inspect") == {name: f"--{name}" for name in options}  # CACHE has none
    assert flags("train")["rate"] == "--learning-rate"
    assert flags("train", {"rate": "--lr"})["rate"] == "--lr"


def test_commands_say_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_cache(tmp_path / "cache")
    train = ["train", "--student", "train_cases:tiny", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "o")]
    for wrong, message in (
        (["--rate", "-1"], "--rate -1.0: expected a number from 0 to inf."),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: expected an integer from 1 on."),
        (["--treatment", "sampled", "--divergence", "jsd"], "--treatment: got 'sampled' with divergence 'jsd'"),
        (["--evaluate-positions", "1"], "--evaluate-positions: got 1, which leaves nothing of the"),
        (["--skip", "9999"], "--skip: got 9999, which leaves nothing of the"),
    ):
        assert cli.main([*train, *wrong]) == 1
        out, told = capfd.readouterr()
        assert out == ""
        assert told.startswith(f"fastkd: {message}"), told


def test_repeated_flags_of_several_values_add_up() -> None:
    """Without this, the last would silently replace the others."""
    needed = ["train", "--student", "s", "--cache", "c", "--out", "o"]
    for more, expected in (
        (["--match", "1:1:mse:1", "2:2:mse:1"], ("1:1:mse:1", "2:2:mse:1")),
        (["--match", "1:1:mse:1", "--steps", "3", "--match", "2:2:mse:1", "auto"], ("1:1:mse:1", "2:2:mse:1", "auto")),
        (["--match=-1:8:mse:1", "--match", "-2:7:mse:1", "--match=auto"], ("-1:8:mse:1", "-2:7:mse:1", "auto")),
    ):
        command = parse([*needed, *more])
        assert command.match == expected
        assert command.adam_betas == (0.9, 0.95)
    assert command.steps is None
