"""What the README and the guides say holds: snippets run, commands are ones that there are, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd.bench.suites import SUITES
from fastkd.parsing import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def commands(text: str) -> list[str]:
    """What a page tells a person to type, with and without what starts it on several processes."""
    lines = [line.strip() for line in re.findall(r"^    (.+)$", text, re.MULTILINE)]
    lines += re.findall(r"`([^`\n]+)`", text.replace("\n", " "))
    found = []
    for line in lines:
        line = re.sub(r"^(srun|torchrun .*?--no-python) ", "", line.partition("  #")[0].strip())
        if re.match(r"(\.venv/bin/)?fastkd [a-z]", line):
            found.append(line)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_snippets_run(name: str) -> None:
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
        exec(snippet, names)
    for value in names.values():
        assert not isinstance(value, Tensor) or value.isfinite().all()


def test_the_loss_in_parts_is_the_loss() -> None:
    """Both snippets of losses.md are of the same eight positions: whole, and in two parts of one step."""
    torch.manual_seed(0)
    whole, parts = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    gradients = []
    for snippet in (whole, parts):
        exec(snippet, names)
        weight = names["weight"]
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        gradients.append(weight.grad)
        weight.grad = None
    assert gradients[0].any()
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_ones_that_there_are(name: str) -> None:
    for command in commands((ROOT / name).read_text()):
        if "..." in command or command.split()[1:] == ["COMMAND", "--help"]:
            continue
        _, *args = shlex.split(command)
        if "--help" in args:
            with pytest.raises(SystemExit) as stop:
                parse(args)
            assert stop.value.code == 0
            continue
        # a command that is named in passing lacks what it needs; one of a block of code does not
        found = complete(args)
        assert type(parse(found)).__name__.lower() == args[0], command


def complete(args: list[str]) -> list[str]:
    """A command named in passing with the arguments that it cannot do without."""
    needed = {
        "capture": ["--teacher", "T", "--data", "D", "--out", "O"],
        "plan": ["--teacher", "T", "--data", "D"],
        "train": ["--student", "S", "--cache", "C", "--out", "O"],
        "sweep": ["--student", "S", "--cache", "C", "--out", "O"],
    }.get(args[0], [])
    more = [word for i in range(0, len(needed), 2) if needed[i] not in args for word in needed[i : i + 2]]
    place = {"inspect": "C", "verify": "C", "seal": "C", "report": "R", "completion": "bash"}.get(args[0])
    bare = len(args) == 1 or args[1].startswith("--")
    return args[:1] + ([place] if place and bare else []) + args[1:] + more


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_what_is_to_be_made_and_run_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)[`\s:]", "\n".join(re.findall(r"^    .*$|`[^`]*`", text, re.M)))) <= targets
    for script in re.findall(r"python ((?:bench|examples)/\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for suites in re.findall(r"fastkd bench((?: [a-z]+)+)", text):
        assert set(suites.split()) <= SUITES.keys()
