"""The pages of the documentation: their snippets, commands, links and headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
LINKED = {
    name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "LOG.md", "RESULTS.md", "cache/FORMAT.md")
} | PAGES
STARTERS = ("torchrun", "srun")  # starts several processes
_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


class Snippet(NamedTuple):
    word: str
    """What stands after the language: a file name, or what runs it; usually nothing."""
    code: str


def snippets(page: str) -> list[Snippet]:
    """The Python of a page."""
    found = re.findall(r"^```python *(\S*)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [Snippet(word, code) for word, code in found]


def lines(page: str) -> list[str]:
    """The indented lines of a page, which are typed into a shell; a command on several lines as one."""
    text = re.sub(r"\\\n +", "", _FENCED.sub("", PAGES[page]))
    return re.findall(r"^    (\S.*)$", text, re.M)


def commands(page: str) -> list[str]:
    """Commands of fastkd among these lines, without comments."""
    found = [re.sub(r"\s+#.*", "", line) for line in lines(page) if line.startswith(("fastkd ", *STARTERS))]
    return [line for line in found if "fastkd" in line.split()]  # torchrun also starts scripts


def mentions(page: str) -> list[str]:
    """Commands of fastkd within a sentence."""
    text = _FENCED.sub("", PAGES[page])
    return [" ".join(found.split()) for found in re.findall(r"`((?:torchrun [^`]*)?fastkd [a-z][^`]*)`", text)]


def words_of(line: str, values: dict[str, str]) -> list[str]:
    """The words of a command after fastkd, each replaced by its value if it has one."""
    words = shlex.split(line)
    return [values.get(word, word) for word in words[words.index("fastkd") + 1 :]]


def links(page: str) -> list[tuple[str, str]]:
    """Targets and anchors of the links of a page that lead to files of the repository."""
    text = re.sub(r"`[^`\n]+`", "", _FENCED.sub("", LINKED[page]))
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text)
    found += [(target, "") for target in re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    return [(target, anchor) for target, anchor in found if "://" not in target]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, where GitHub and the site agree on them."""
    headings = re.findall(r"^#+ +(.*?) *$", _FENCED.sub("", LINKED[page]), re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}
