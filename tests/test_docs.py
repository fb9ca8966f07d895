"""The README and the guides are right: snippets run, links resolve, scripts and suites exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd.bench.suites import SUITES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def test_the_tests_that_documents_name_are_there() -> None:
    """Files, and functions by name, in the guides and in the description of the format."""
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    functions = set(re.findall(r"^\s*def (test_\w+)", "\n".join(tests.values()), re.MULTILINE))
    named = 0
    for page in [*PAGES, ROOT / "cache" / "FORMAT.md"]:
        text = page.read_text()
        for file in re.findall(r"\btests/[\w/]+\.\w+", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
            named += 1
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in functions, f"{page.name}: {name}"
            named += 1
    assert named > 20


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
    whole, parts, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses.md").read_text(), re.DOTALL)
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
