"""The pages of the site, made of the Markdown of the repository: python docs/tools/pages.py

The Markdown is written to be read in the repository. In build/docs/pages, README.md is the first page, links to files
are links to pages, the notebook and the reference of commands are pages, and a picture with a light and a dark form
shows the one of the chosen palette. No feature of a site generator is used for this: another one can take its place.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import commands
import notebook

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "docs"
# Files outside of docs/ that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
    "RESULTS.md": "results.md",
    "cache/FORMAT.md": "format.md",
}
COMMANDS = "docs/reference/commands.md"
_CODE = re.compile(r"(^```.*?^```|(?<!\[)`[^`\n]*\]\([^`\n]*`)", re.DOTALL | re.MULTILINE)  # links in code are none


def lay_out(package: Path) -> None:
    """Make a folder of links with the layout of the installed package: fastkd, with bench, cache and kernels in it."""
    package.mkdir(parents=True)
    children = {path.name: path for path in (ROOT / "fastkd").iterdir() if path.name != "__pycache__"}
    children |= {name: ROOT / name for name in ("bench", "cache", "kernels")}
    for name, path in children.items():
        (package / name).symlink_to(os.path.relpath(path, package))


def make(folder: Path, package: Path) -> None:
    """Write all pages, and what they show, into a new folder. Raises ValueError for a link that leads nowhere."""
    for path in sorted((ROOT / "docs").rglob("*")):
        place = folder / path.relative_to(ROOT / "docs")
        if path.suffix in (".css", ".svg"):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        elif path.suffix == ".ipynb" and not path.parent.name.startswith("."):
            shown = notebook.as_markdown(path)
            write(place.with_suffix(".md"), shown.text, path)
            for name, content in shown.pictures.items():
                (place.parent / name).write_bytes(content.encode() if isinstance(content, str) else content)
        elif path.suffix == ".md":
            text = path.read_text()
            if path == ROOT / COMMANDS:
                text += commands.reference(package.parent)
            write(place, text, path)
    for source, page in PAGES.items():
        write(folder / page, (ROOT / source).read_text(), ROOT / source)


def write(place: Path, text: str, source: Path) -> None:
    """Write a page. source: its file in the repository, from which its links lead."""
    parts = _CODE.split(text)
    page = _name(source) or ""
    parts[::2] = [_linked(_pictures(part), source, page) for part in parts[::2]]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(re.sub(r"^```(\w+) \S+$", r"```\1", "".join(parts), flags=re.MULTILINE))  # words for the tests


def _name(path: Path) -> str | None:
    """The name of a file's page, or of a picture, on the site; None for a file that is not there."""
    inside = path.relative_to(ROOT).as_posix()
    if inside in PAGES:
        return PAGES[inside]
    if not inside.startswith("docs/") or path.suffix not in (".md", ".ipynb", ".svg"):
        return None
    return inside.removeprefix("docs/").replace(".ipynb", ".md")


def _pictures(text: str) -> str:
    """`<picture>` with a dark and a light source, as two images of which the theme shows one."""

    def both(found: "re.Match[str]") -> str:
        dark, light, alternative = found["dark"], found["light"], found["alternative"]
        return f"![{alternative}]({light}#only-light)![{alternative}]({dark}#only-dark)"

    return re.sub(
        r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)">\s*'
        r'<img (?=[^>]*src="(?P<light>[^"]+)")(?=[^>]*alt="(?P<alternative>[^"]+)")[^>]*>\s*</picture>',
        both,
        text,
    )


def _linked(text: str, source: Path, page: str) -> str:
    """Links to files of the repository as links to pages. What is no page keeps its text."""

    def resolved(found: "re.Match[str]") -> str:
        target, anchor = found["target"], found["anchor"] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return found[0]
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            beside = source.suffix == ".ipynb"  # the outputs of a notebook are pictures beside it
            if beside and path.suffix in (".svg", ".png"):
                return found[0]
            raise ValueError(f"{source}: got a link to {target}; expected a file of the repository.")
        name = _name(path)
        if name is None:
            return found["text"]
        return f"{found['mark']}[{found['text']}]({os.path.relpath(name, Path(page).parent)}{anchor})"

    link = r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
    return re.sub(link, resolved, text)


def check_offline(site: Path) -> None:
    """No page asks for anything from another host while it is read. Raises ValueError for one that does."""
    fetched = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href|srcset)="?((?:https?:)?//[^"\s>]+)')
    for path in site.rglob("*.html"):
        for address in fetched.findall(path.read_text()):
            raise ValueError(f"{path}: got {address}; expected a page that loads nothing from other hosts.")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check_offline(ROOT / "build" / "site")
    else:
        shutil.rmtree(BUILT, ignore_errors=True)
        lay_out(BUILT / "fastkd")
        make(BUILT / "pages", BUILT / "fastkd")
