"""Every command in the README runs, or at least exists if a test cannot run it."""

import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hf_cases import WORDS, config_of, saved, tokenizer_of

from fastkd.cli import main as cli
from fastkd.cli.commands import COMMANDS
from fastkd.cli.flags import flags
from fastkd.cli.parse import parse

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
STARTERS = ("torchrun", "srun")  # starts several processes
ELSEWHERE = ("--ray", "vllm:", "http://")  # needs a cluster, an engine, a server
# Placeholders of the page, and their values here.
NAMES = {"CACHE": "my-cache", "T": "HuggingFaceTB/SmolLM2-135M", "[--deep]": "--deep"}


def blocks(page: str) -> list[str]:
    """Commands of fastkd in a page's indented blocks, without comments."""
    text = re.sub(r"\\\n +", "", re.sub(r"```.*?```", "", PAGES[page], flags=re.S))  # a command on several lines
    lines = re.findall(r"^    (\S.*)$", text, re.M)
    starts = ("fastkd ", *STARTERS)
    found = [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith(starts)]
    return [line for line in found if "fastkd" in line.split()]  # torchrun also starts scripts


def mentions(page: str) -> list[str]:
    """Commands of fastkd within a sentence."""
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    return [" ".join(found.split()) for found in re.findall(r"`((?:torchrun [^`]*)?fastkd [a-z][^`]*)`", text)]


def words_of(line: str) -> list[str]:
    """The command without what precedes fastkd."""
    words = shlex.split(line)
    return [NAMES.get(word, word) for word in words[words.index("fastkd") + 1 :]]


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_spoken_of_are_there(page: str) -> None:
    for line in [*blocks(page), *mentions(page)]:
        name, *words = words_of(line)
        assert name in COMMANDS, line
        known = {"--" + field.replace("_", "-") for field in COMMANDS[name].__dataclass_fields__} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_stand_by_themselves_are_whole(page: str) -> None:
    for line in blocks(page):
        assert parse(words_of(line)) is not None
        assert flags(words_of(line)[0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README names: a tiny model replaces the one on the Hub, since a folder wins."""
    (tmp_path / "HuggingFaceTB").mkdir()
    # as many layers as the page names
    saved(tmp_path / "HuggingFaceTB", "llama", vocab_size=300, num_hidden_layers=21).rename(tmp_path / NAMES["T"])
    config_of("llama", vocab_size=300, num_hidden_layers=17).save_pretrained(tmp_path / "my-student")
    for model in (NAMES["T"], "my-student"):
        tokenizer_of().save_pretrained(tmp_path / model)
    (tmp_path / "corpus").mkdir()
    texts = [WORDS[i : i + 60] for i in range(100)]
    for part in range(2):
        pq.write_table(pa.table({"text": texts[part::2]}), tmp_path / "corpus" / f"{part}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_commands_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In their order, once each, except those that need several machines."""
    ran = []
    for line in dict.fromkeys(blocks("README.md")):
        if line.startswith(STARTERS) or "..." in line or any(mark in line for mark in ELSEWHERE):
            continue
        assert cli.main(words_of(line)) == 0, (line, capfd.readouterr().err)
        ran.append(line.split()[1])
    assert {"plan", "capture", "train", "report", "inspect", "verify", "sweep"} <= set(ran)
    assert (folder / "run" / "report.html").exists()
    assert (folder / "run" / "control" / "student").is_dir()
    assert "sealed" in capfd.readouterr().out


def test_what_else_is_to_be_typed_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for text in PAGES.values():
        assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)) <= targets
        for script, arguments in re.findall(r"\.venv/bin/python (\S+\.py)([^`\n]*)", text):
            source = (ROOT / script).read_text() + (ROOT / "bench" / "harness.py").read_text()
            assert all(f'"{flag}"' in source for flag in re.findall(r"--[a-z-]+", arguments)), (script, arguments)
        for extra in re.findall(r"pip install '(?:\.|fastkd)\[(\w+)\]'", text):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), extra
    assert targets
