"""--config, --print-config, and the config.toml of a run."""

import json
import tomllib
from dataclasses import MISSING, fields, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from train_cases import make_cache

from fastkd.cli import main as cli
from fastkd.cli.commands import COMMANDS, Train
from fastkd.cli.config import config_text, read_config
from fastkd.cli.options import Option, UsageError, arguments, options_of
from fastkd.cli.parse import parse
from fastkd.cli.run_config import leave_config
from fastkd.settings import TrainSettings
from fastkd.utils.atomic import write_json
from fastkd.utils.secrets import masked

NEEDED: dict[str, Any] = {"student": "s", "cache": ("c",), "out": Path("o")}


def train(**values: Any) -> Train:
    return Train(**{**NEEDED, **values})


def read(path: Path, text: str, command: str = "train") -> dict[str, list[str]]:
    path.write_text(text, encoding="utf-8")
    return read_config(str(path), command)


def test_a_file_stands_for_options_and_what_is_typed_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'student = "s"\ncache = "c"\nout = "o"\nsteps = 5\ncontrol = true\nmatch = ["a", "b"]\nclip = "None"\n'
        "[optimization]\nlearning-rate = 1\n[checkpoints]\nkeep = 3\n[live_teacher]\nteacher_dtype = 'float16'\n"
    )
    found = parse(["train", "--config", str(file)])
    same = train(steps=5, control=True, match=("a", "b"), clip=None, rate=1.0, keep=3, teacher_dtype="float16")
    assert found == same
    typed = ["--steps", "7", "--no-control", "--match", "c", "--lr", "2", "--out", "p", "--clip", "1"]
    assert parse(["train", *typed, "--config", str(file)]) == replace(
        same, steps=7, control=False, match=("c",), rate=2.0, out=Path("p"), clip=1.0
    )


def test_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text(
        "student: s\ncache: c\nout: o\nclip: null\nsteps: null\noptimization:\n  rate: 1e-3\nexits: [1, 2]\n"
    )
    assert parse(["train", "--config", str(file)]) == train(clip=None, rate=1e-3, exits=(1, 2))
    file.write_text("a: [")
    with pytest.raises(UsageError, match="not YAML"):
        read_config(str(file), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raet = 1", "raet: `fastkd train` has no such option. Did you mean rate?"),
        ("[optimisation]\nrate = 1", "optimisation: got a table; .*Did you mean optimization?"),
        ("[optimization]\n[optimization.x]\nrate = 1", "optimization.x: got a table; expected a value"),
        ("rate = 1\nlr = 2", "lr: got it twice, also as rate; expected it once"),
        ("steps = 1.5", "steps: got '1.5'; expected an integer"),
        ("steps = true", "steps: got True; expected a number"),
        ("control = 1", "control: got 1; expected true or false"),
        ("rate = [1, 2]", "rate: got a list; expected one value"),
        ("adam_betas = [0.9]", "adam_betas: got a list of 1; expected a list of 2 values"),
        ("rate_schedule = 'cosin'", "rate_schedule: got 'cosin'; expected one of .* Did you mean cosine?"),
        ("student = 2026-01-01", "student: got datetime.date.*; expected text"),
        ("rate = ", "not TOML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "run.toml", text)


def test_a_file_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").touch()
    assert cli.main(["train", "--config", str(tmp_path / "run.tml")]) == 2
    assert (
        f"does not exist; expected a file of TOML or YAML. Did you mean {tmp_path / 'run.toml'}?"
        in capfd.readouterr().err
    )


def needed(name: str) -> list[str]:
    """Arguments of a command that has to have some."""
    values = {
        option.name: [option.choices[0] if option.choices else str(i) for i in range(2 if option.count is None else 1)]
        for option in options_of(name)
        if option.default is MISSING
    }
    return arguments(name, values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("deep.toml", f"steps = {'[' * 3000}", "not TOML: maximum recursion depth"),
        ("long.toml", f"steps = {'9' * 5000}", "not TOML: Exceeds the limit"),
        ("deep.yaml", "[" * 3000, "not YAML: maximum recursion depth"),
        ("long.yaml", f"steps: {'9' * 5000}", "not YAML: Exceeds the limit"),
        ("date.yaml", "out: 2020-13-45", "not YAML: month must be"),
        ("twice.yaml", "steps: 1\nrate: 2\nsteps: 3", "not YAML: found 'steps' twice"),
        ("inner.yaml", "optimization:\n  steps: 1\n  steps: 3", "not YAML: found 'steps' twice"),
        ("python.yaml", "out: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_a_parser_cannot_take_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name, text)


def test_a_short_file_that_stands_for_long_lists_gets_a_short_message(tmp_path: Path) -> None:
    lists = [f"    - &n{one} [{', '.join([f'*n{one - 1}' if one else 'x'] * 9)}]" for one in range(12)]
    with pytest.raises(UsageError, match="cache: got a list of 9; expected text") as caught:
        read(tmp_path / "run.yaml", "cache:\n" + "\n".join(lists))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reproduces_itself(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, *needed(name), "--print-config"]) == 0
    text, told = capfd.readouterr()
    assert told == ""
    tomllib.loads(text)
    (tmp_path / "run.toml").write_text(text)
    assert parse([name, "--config", str(tmp_path / "run.toml")]) == parse([name, *needed(name)])


def test_what_a_terminal_does_not_show_survives_print_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A no-break space, as file managers make them, and characters of control and direction."""
    given = ["train", "--student", "a\xa0b\xad", "--cache", "\x9b[31m\x7f", "\u202ec\u2028", "--out", "\U000e0041\n"]
    assert cli.main([*given, "--print-config"]) == 0
    (tmp_path / "run.toml").write_text(capfd.readouterr().out, encoding="utf-8")
    assert parse(["train", "--config", str(tmp_path / "run.toml")]) == parse(given)


def words(option: Option, *, first: bool) -> st.SearchStrategy[Any]:
    """Values of one word of an option. first: it stands behind `=`, and may begin with a dash."""
    if option.choices:
        return st.sampled_from(option.choices)
    if int in option.types:
        return st.integers(-(10**9), 10**9)
    if float in option.types:
        return st.floats(allow_nan=False)
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    text = text.filter(lambda one: masked(one) == one and one != "None" and (first or not one.startswith("-")))
    return text.map(Path) if option.types == {Path} else text


def values(option: Option) -> st.SearchStrategy[Any]:
    if option.count == 0:
        return st.booleans()
    if option.count == 1:
        one = words(option, first=True)
        return st.none() | one if option.optional else one
    most = 3 if option.count is None else option.count
    return st.lists(words(option, first=False), min_size=option.count or 0, max_size=most).map(tuple)


@given(st.sampled_from(["train", "capture", "verify", "bench"]), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_values_survive_a_file(name: str, data: st.DataObject) -> None:
    """Numbers, texts, paths, lists, switches and None, through TOML and the whole parser."""
    options = [option for option in options_of(name) if option.name != "json"]
    drawn = data.draw(st.lists(st.sampled_from(options), max_size=12, unique_by=lambda option: option.name))
    required = [option for option in options if option.default is MISSING and option not in drawn]
    command = COMMANDS[name](**{option.name: data.draw(values(option)) for option in [*required, *drawn]})
    text = config_text(name, command)
    with NamedTemporaryFile("w", suffix=".toml", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        assert parse([name, "--config", file.name]) == command, text


def test_credentials_are_never_written(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    text = config_text("train", train(cache=("s3://me:hunter2@bucket/x",), data=("a", "b?hunter2hunter2"), best="m:n"))
    assert "hunter2" not in text
    assert "# cache: left out, since it has credentials. Give it on the command line." in text
    assert "# data: left out" in text
    assert tomllib.loads(text)["evaluation"]["best"] == "m:n"
    assert cli.main(["train", "--student", "s", "--out", "o", "--cache", "s3://me:hunter2@b/x", "--print-config"]) == 0
    assert "hunter2" not in "".join(capfd.readouterr())


def test_text_that_is_not_unicode_is_left_out() -> None:
    assert "# student: left out, since it is not Unicode." in config_text("train", train(student="a\udc80"))


def test_a_run_leaves_a_file_that_reproduces_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_cache(tmp_path / "cache")
    given = ["--student", "train_cases:tiny", "--cache", str(tmp_path / "cache"), "--steps", "2", "--lr", "0.003"]
    assert cli.main(["train", *given, "--out", str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "config.toml"
    before = file.read_bytes()
    assert parse(["train", "--config", str(file)]) == parse(["train", *given, "--out", str(tmp_path / "run")])
    assert cli.main(["train", "--config", str(file), "--out", str(tmp_path / "again"), "--json"]) == 0
    one, other = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "again"))
    losses = [[json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)] for lines in (one, other)]
    assert losses[0] == losses[1] != []
    # a call that is refused leaves the file as it is
    assert cli.main(["train", "--config", str(file), "--seed", "5"]) == 1
    assert file.read_bytes() == before
    capfd.readouterr()


def test_the_arms_of_a_command_have_files_of_their_own(tmp_path: Path) -> None:
    """Those of a sweep, and the control of a training: what `fastkd train` makes them with."""
    out = tmp_path / "sweep"
    settings = {one.name: getattr(TrainSettings(), one.name) for one in fields(TrainSettings)}
    for alpha in (0.0, 1.0):
        arm = out / f"alpha={alpha}" / "seed=3"
        write_json_of(arm / "run.json", {"settings": settings | {"alpha": alpha, "seed": 3}})
    write_json_of(out / "sweep.json", {})
    leave_config("sweep", parse(["sweep", "--student", "s", "--cache", "c", "--data", "m:d", "--out", str(out)]))
    assert parse(["sweep", "--config", str(out / "config.toml")]).out == out
    arm = out / "alpha=1.0" / "seed=3"
    assert parse(["train", "--config", str(arm / "config.toml")]) == train(out=arm, data=("m:d",), alpha=1.0, seed=3)

    run = tmp_path / "run"
    write_json_of(run / "run.json", {})
    write_json_of(run / "control" / "run.json", {"settings": settings | {"alpha": 1.0}})
    leave_config("train", train(out=run, control=True))
    assert parse(["train", "--config", str(run / "config.toml")]) == train(out=run, control=True)
    assert parse(["train", "--config", str(run / "control" / "config.toml")]) == train(out=run / "control", alpha=1.0)
    for damaged in ("[]", '{"settings": 5}', "{"):  # the command itself is done, and says nothing of it
        (run / "control" / "run.json").write_text(damaged)
        leave_config("train", train(out=run, control=True))
    # nothing is written where nothing has begun
    leave_config("train", train(out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"push": "me/mine", "push_private": True, "card_teacher": "Big"}, {"card_teacher": "Big"}),
        ({"rollouts": 0.5, "rollout_tokens": 8, "teacher": "t", "teacher_dtype": "float32"}, {}),
        ({"cache": (), "data": ("d",), "teacher": "ema:0.99", "held_out": 0.2}, {"held_out": 0.2}),
        ({"cache": (), "data": ("d",), "teacher": "t", "rollouts": 0.5, "k": 4}, {"teacher": "t", "k": 4}),
    ],
    ids=["upload", "rollouts beside a cache", "teacher made of the student", "rollouts with a live teacher"],
)
def test_a_control_is_reproduced_alone(tmp_path: Path, given: dict[str, Any], kept: dict[str, Any]) -> None:
    """Its file is no command that is refused, nor one that uploads it in the student's place."""
    write_json_of(tmp_path / "run.json", {})
    settings = {one.name: getattr(TrainSettings(), one.name) for one in fields(TrainSettings)}
    write_json_of(tmp_path / "control" / "run.json", {"settings": settings | {"alpha": 1.0}})
    leave_config("train", train(out=tmp_path, control=True, **given))
    found = parse(["train", "--config", str(tmp_path / "control" / "config.toml")])
    data = {name: given[name] for name in ("cache", "data") if name in given}
    assert found == train(out=tmp_path / "control", alpha=1.0, **data, **kept)


@pytest.mark.parametrize(("name", "file"), [("mutual", "run.json"), ("generations", "generations.json")])
def test_commands_without_arms_of_their_own(tmp_path: Path, name: str, file: str) -> None:
    write_json_of(tmp_path / file, {})
    words = ["--student", "s", "--teacher", "t", "--data", "d", "--out", str(tmp_path)]
    words = [*["1"] * (name == "generations"), *words]
    leave_config(name, parse([name, *words]))
    assert parse([name, "--config", str(tmp_path / "config.toml")]) == parse([name, *words])


def test_a_damaged_file_beside_a_run_is_written_again(tmp_path: Path) -> None:
    write_json_of(tmp_path / "run.json", {})
    (tmp_path / "config.toml").write_bytes(b"\xff")
    (tmp_path / ".config.toml.1.part").write_text("of a process that was killed")
    leave_config("train", train(out=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "run.json"]
    assert parse(["train", "--config", str(tmp_path / "config.toml")]) == train(out=tmp_path)


def write_json_of(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
