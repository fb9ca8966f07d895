"""What someone may have meant."""

from pathlib import Path

import pytest

from fastkd.utils.similar import did_you_mean, similar, similar_path

KNOWN = ["rate", "batch_tokens", "batch_size", "steps", "temperature", "temperatures", "control", "k", "cosine"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raet", ["rate"]),
        ("batch", ["batch_tokens", "batch_size"]),
        ("batch-size", ["batch_size"]),
        ("STEPS", ["steps"]),
        ("temprature", ["temperature", "temperatures"]),
        ("kontrol", ["control"]),
        ("K", ["k"]),
        ("zzz", []),
        ("", []),
    ],
)
def test_names(name: str, expected: list[str]) -> None:
    assert similar(name, KNOWN) == expected


def test_the_question() -> None:
    assert did_you_mean("raet", KNOWN, prefix="--") == " Did you mean --rate?"
    assert did_you_mean("zzz", KNOWN) == did_you_mean("rate", ["rate"]) == did_you_mean("x", []) == ""


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher" / "model").mkdir(parents=True)
    (tmp_path / "run.toml").touch()
    assert similar_path(str(tmp_path / "techer")) == str(tmp_path / "teacher")
    assert similar_path(str(tmp_path / "techer" / "model")) == str(tmp_path / "teacher" / "model")
    assert similar_path(str(tmp_path / "techer" / "other")) is None
    assert similar_path(str(tmp_path / "teacher")) is None  # it is there
    for place in ("s3://bucket/techer", "", "a\0b", str(tmp_path / "zzz"), str(tmp_path / "run.toml" / "x")):
        assert similar_path(place) is None
    monkeypatch.chdir(tmp_path)
    assert similar_path("run.tml") == "run.toml"
    assert similar_path("../" + tmp_path.name + "/techer") == "../" + tmp_path.name + "/teacher"
