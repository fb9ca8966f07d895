"""Every command of the README, the tutorials and the guides exists; those of the README and the tutorials run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, STARTERS, commands, lines, mentions, snippets, words_of
from hf_cases import WORDS, saved, tokenizer_of

from fastkd.cli import main as cli
from fastkd.cli.commands import COMMANDS
from fastkd.cli.flags import flags
from fastkd.cli.groups import SPELLINGS
from fastkd.cli.options import CONFIG, PRINT_CONFIG, options_of
from fastkd.cli.parse import parse

# Placeholders of the pages, and their values here.
TEACHER = "HuggingFaceTB/SmolLM2-135M"
VALUES = {"CACHE": "my-cache", "T": TEACHER, "[--deep]": "--deep"}
ELSEWHERE = ("--ray", "vllm:", "http://", "s3://")  # needs a cluster, an engine, a server, a store
QUICK = {"plan": ["--seconds", "0.5"], "sweep": ["--seeds", "1", "--evaluate-every", "0"]}  # added to a command here


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_spoken_of_are_there(page: str) -> None:
    for line in [*commands(page), *mentions(page)]:
        name, *words = words_of(line, VALUES)
        assert name in COMMANDS, line
        known = {flag for option in options_of(name) for flag in option.flags} | {"--help", CONFIG, PRINT_CONFIG}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_stand_by_themselves_are_whole(page: str) -> None:
    for line in commands(page):
        assert parse(words_of(line, VALUES)) is not None
        assert flags(words_of(line, VALUES)[0])


def test_pages_spell_options_as_the_help_does() -> None:
    older = {f"--{word}" for words in SPELLINGS.values() for word in words[1:]}
    for page, text in PAGES.items():
        assert not older & set(re.findall(r"--[a-z][a-z-]*", text)), page


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the pages' lines are typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run_page(page: str, ran: set[str]) -> None:
    """What a page tells to do, in the current folder: files, then commands, then snippets.

    ran: commands that another page had too, and that are not run again.
    """
    for snippet in snippets(page):
        if snippet.word.endswith(".py"):
            Path(snippet.word).write_text(snippet.code)
    for line in lines(page):
        if line.startswith("python -c ") and line not in ran:
            shorter = line.replace("[:40_000]", "[:600]").replace("python", sys.executable, 1)
            assert subprocess.run(shorter, shell=True).returncode == 0
            ran.add(line)
    for line in commands(page):
        words = words_of(line.replace("--epochs 4", "--epochs 1"), VALUES)
        if words[0] == "demo" or line.startswith(STARTERS) or any(mark in line for mark in ELSEWHERE) or line in ran:
            continue
        assert cli.main([*words, *QUICK.get(words[0], [])]) == 0, line
        ran.add(line)
    names: dict[str, object] = {}
    for snippet in snippets(page):
        if not snippet.word:
            exec(snippet.code, names)


def test_the_pages_of_text_run(folder: Path) -> None:
    """In their order; a tiny model replaces the one on the Hub, since a folder wins."""
    # as many layers as a page names
    made = saved(folder, "llama", vocab_size=300, num_hidden_layers=11, hidden_size=16, intermediate_size=16)
    (folder / TEACHER).parent.mkdir()
    made.rename(folder / TEACHER)
    tokenizer_of().save_pretrained(folder / TEACHER)
    (folder / f"{TEACHER}-Instruct").symlink_to(folder / TEACHER)
    turns = [{"role": "user", "content": WORDS[:20]}, {"role": "assistant", "content": WORDS[20:80]}]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(16)))
    ran: set[str] = set()
    for page in ("README.md", "docs/tutorials/text.md", "docs/tutorials/chat.md", "docs/tutorials/batch-job.md"):
        run_page(page, ran)
    done = {line.split()[1] for line in ran}
    assert done >= {
        "plan",
        "capture",
        "inspect",
        "verify",
        "student",
        "train",
        "report",
        "sweep",
        "match",
        "export-cache",
    }
    assert (folder / "run" / "report.html").exists()
    assert (folder / "run" / "control" / "student").is_dir()
    assert (folder / "chat-run" / "student-merged").is_dir()


def test_the_page_of_images_runs(folder: Path) -> None:
    run_page("docs/tutorials/images.md", set())
    assert (folder / "digits-run" / "student" / "model.safetensors").exists()


def test_what_else_is_to_be_typed_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for text in PAGES.values():
        assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)) <= targets
        for script, arguments in re.findall(r"\.venv/bin/python (\S+\.py)([^`\n]*)", text):
            source = (ROOT / script).read_text() + (ROOT / "bench" / "harness.py").read_text()
            assert all(f'"{flag}"' in source for flag in re.findall(r"--[a-z-]+", arguments)), (script, arguments)
        for extras in re.findall(r"pip install '(?:\.|fastkd)\[([\w,]+)\]'", text):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), extra
    assert targets
