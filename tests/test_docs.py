"""The README and the guides are right: snippets run, links resolve, scripts and suites exist."""

import json
import re
from pathlib import Path

import pytest
import torch
from doc_pages import LINKED, PAGES, ROOT, anchors, links, snippets
from torch import Tensor

from fastkd.bench.suites import SUITES

# Their snippets need what their commands leave: tests/test_readme_commands.py runs them.
WITH_COMMANDS = ("README.md", "docs/tutorials/text.md", "docs/tutorials/chat.md", "docs/tutorials/images.md")


def test_the_tests_that_documents_name_are_there() -> None:
    """Files, and functions by name, in the guides and in the description of the format."""
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    functions = set(re.findall(r"^\s*def (test_\w+)", "\n".join(tests.values()), re.MULTILINE))
    named = 0
    for page in [*PAGES, "cache/FORMAT.md"]:
        text = LINKED[page]
        for file in re.findall(r"\btests/[\w/]+\.\w+", text):
            assert (ROOT / file).exists(), f"{page}: {file}"
            named += 1
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in functions, f"{page}: {name}"
            named += 1
    assert named > 20


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page) and page not in WITH_COMMANDS])
def test_snippets_run(page: str) -> None:
    names: dict[str, object] = {}
    for snippet in snippets(page):
        if snippet.word != "torchrun":
            exec(snippet.code, names)
    for value in names.values():
        assert not isinstance(value, Tensor) or value.isfinite().all()


def test_the_loss_in_parts_is_the_loss() -> None:
    """Both snippets of losses.md are of the same eight positions: whole, and in two parts of one step."""
    torch.manual_seed(0)
    whole, parts, *_ = snippets("docs/losses.md")
    names: dict[str, object] = {}
    gradients = []
    for snippet in (whole, parts):
        exec(snippet.code, names)
        weight = names["weight"]
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        gradients.append(weight.grad)
        weight.grad = None
    assert gradients[0].any()
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    """To files, and to headings of pages."""
    for target, anchor in links(page):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        name = path.resolve().relative_to(ROOT).as_posix()
        if anchor:
            assert anchor in anchors(name), f"{target}#{anchor}"


def test_every_page_is_on_the_site() -> None:
    """In the navigation of mkdocs.yml; `make docs` checks that everything there exists."""
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert re.search(rf"[ :-] {re.escape(page.removeprefix('docs/'))}$", listed, re.M) or page == "README.md", page


def test_the_notebook_is_as_it_ran() -> None:
    """Its cells were run in their order, from the first, without an error. `make docs` runs them."""
    cells = json.loads((ROOT / "docs/tutorials/first.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}


@pytest.mark.parametrize("page", PAGES)
def test_what_is_to_be_made_and_run_is_there(page: str) -> None:
    text = PAGES[page]
    makefile = Path(ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)[`\s:]", "\n".join(re.findall(r"^    .*$|`[^`]*`", text, re.M)))) <= targets
    for script in re.findall(r"python ((?:bench|docs|examples)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script
    for suites in re.findall(r"fastkd bench((?: [a-z]+)+)", text):
        assert set(suites.split()) <= SUITES.keys()
