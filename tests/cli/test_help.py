"""What the command line says of itself: a line a command, what is needed first, and what a shell completes."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastkd import __version__
from fastkd.cli import main as cli
from fastkd.cli.commands import COMMANDS
from fastkd.cli.groups import COMMAND_GROUPS, GROUPS, SPELLINGS, group_of, grouped
from fastkd.cli.parse import completion_script, parse

ARMS = {"alpha", "temperature", "divergence", "treatment", "rate"}  # of which a sweep takes several


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def said(*args: str) -> str:
        assert cli.main(list(args)) == 0
        out, told = capfd.readouterr()
        assert told == ""
        return out

    return said


def test_a_line_for_each_command_by_what_it_is_for(said: Any) -> None:
    lines = said("--help").splitlines()
    assert max(map(len, lines)) <= 80
    found = [line for line in lines if re.match(r"  [a-z]", line)]
    assert sorted(line.split()[0] for line in found) == sorted(COMMANDS)
    assert all(line.endswith(".") for line in found)
    titles = [line for line in lines if line in COMMAND_GROUPS]
    assert titles == list(COMMAND_GROUPS)
    assert said() == said("--help") == said("-h")
    assert "--version" in said("--help")
    assert said("--version") == f"fastkd {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_in_groups(name: str) -> None:
    """Put a new option into fastkd/cli/groups.py, where it is shown in its place."""
    names = [field.name for field in fields(COMMANDS[name])]
    assert [one for one in names if group_of(name, one) is None] == []
    assert sorted(one for some in grouped(name, names).values() for one in some) == sorted(names)


def test_groups_have_no_options_that_no_command_has() -> None:
    known = {field.name for command in COMMANDS.values() for field in fields(command)}
    listed = [name for names in GROUPS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) | set(SPELLINGS) <= known


def test_groups_are_titles_and_the_most_used_come_first(said: Any) -> None:
    text = said("train", "--help")
    titles = re.findall("╭─ ([a-z ]+) ─", text)
    assert titles[0] == "options"
    wanted = {"model", "data", "optimization", "loss", "evaluation", "checkpoints", "distributed"}
    assert wanted <= set(titles) <= {"options", *GROUPS}
    assert len(titles) == len(set(titles))
    assert max(map(len, text.splitlines())) <= 80
    at = [
        text.index(f"│ --{name} ") for name in ("student", "cache", "steps", "learning-rate", "weight-decay", "alpha")
    ]
    assert at == sorted(at)
    assert "Also --rate, --lr." in " ".join(text.replace("│", " ").split())


def test_a_short_help_has_a_sentence_for_each_option(said: Any) -> None:
    long, short = said("train", "--help"), said("train", "-h")
    for text in (long, short):
        assert len(re.findall("│ --", text)) == len(fields(COMMANDS["train"])) + 2  # --config, --print-config
    assert len(short.splitlines()) < 0.75 * len(long.splitlines())
    assert "Early exits to train" in short
    assert "What enters the next layer" not in short


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_needed_comes_first_and_nothing_is_noise(said: Any, name: str) -> None:
    text = re.sub(r"\n[╰╭].*", "", said(name, "--help"))  # groups
    assert not re.search(r"\{None\}|default: (None|False)?\)", text)
    options = re.split(r"│ --", text)[1:]
    required = ["(required)" in option for option in options]
    assert required == sorted(required, reverse=True)
    assert len(options) >= len(fields(COMMANDS[name])) - 2
    for option in options:
        assert "(required)" in option or option.rstrip().rstrip("│╰─╯\n ").endswith((".", ")", "...")), option


def test_values_that_may_be_left_out_are_still_read() -> None:
    command = parse(["train", "--student", "s", "--cache", "c", "--out", "o", "--clip", "None", "--device", "cpu"])
    assert command.clip is None
    assert command.device == "cpu"
    assert command.evaluate_every is None
    assert command.out == Path("o")


def test_names_and_defaults_agree() -> None:
    """One name means one thing, or the same kind of it: what has the same name has the same type and default."""
    for group, but in (
        (("capture", "plan"), set()),
        (("train", "sweep"), ARMS | {"cache", "data"}),  # a sweep needs a cache
        (("capture", "demo"), {"out", "teacher"}),
    ):
        one, other = ({f.name: f for f in fields(COMMANDS[name])} for name in group)
        # windows there, a fraction here
        shared = one.keys() & other.keys() - but - {"held_out", "json"}
        assert len(shared) > 2
        for name in shared:
            assert one[name].default == other[name].default, name
    assert all("json" in {f.name for f in fields(command)} for command in COMMANDS.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(said: Any, shell: str) -> None:
    script = said("completion", shell)
    assert script.strip() == completion_script(shell).strip()
    assert "text-documents" in script
    assert all(name in script for name in COMMANDS)


def test_what_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "fastkd").write_text(completion_script("bash"))
    ask = (
        f"source {tmp_path}/fastkd; complete_=$(complete -p fastkd | sed -E 's/.*-F ([^ ]+).*/\\1/'); "
        "COMP_WORDS=(fastkd capture --te); COMP_CWORD=2; COMP_LINE='fastkd capture --te'; COMP_POINT=19; "
        '$complete_; echo "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    assert {"--teacher", "--text-documents", "--temperatures"} <= set(found)
