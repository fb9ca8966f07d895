"""What makes up a document of a text file, and what is said of it before a teacher runs."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_cases import saved, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.cache import open_cache
from fastkd.cli import main as cli
from fastkd.data.documents import SHORT, describe_documents, open_documents
from fastkd.data.lines import TextColumn
from fastkd.errors import DataError

WORDS = ("the ", "quick ", "brown ", "fox ")
PARAGRAPHS = ["the quick\nbrown fox", "jumps", " over the\n lazy dog"]
WRAPPED = "\n\n \t\r\n" + "\n\n".join(PARAGRAPHS) + " \n \n\n"
TEXT: dict[str, Any] = {"tokenizer": lambda text: list(text.encode()), "tokenizer_fingerprint": "bytes"}


def texts(path: Path, documents: str) -> list[str]:
    column = TextColumn(path, None, documents)
    whole: list[str] = column.read(0, len(column))
    assert [column.read(row, row + 1)[0] for row in range(len(column))] == whole
    return whole


def test_a_document_a_paragraph_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(WRAPPED.encode())
    assert texts(path, "blank-line") == PARAGRAPHS
    assert texts(path, "file") == [WRAPPED.rstrip("\r\n")]
    lines = ["the quick", "brown fox", "jumps", " over the", " lazy dog "]
    assert [text for text in texts(path, "line") if text.strip()] == lines
    assert TextColumn(path, None, "blank-line").where(1) == f"{path}, paragraph 2"
    path.write_bytes(b"")
    assert [texts(path, documents) for documents in ("line", "blank-line", "file")] == [[], [], [""]]


@given(st.lists(st.sampled_from(["a", " b", "", " ", "\t", "c d"]), max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_paragraphs_are_those_of_a_plain_reading(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(end.join(lines).encode())
    expected: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            expected[-1].append(line)
        elif expected[-1]:
            expected.append([])
    assert texts(path, "blank-line") == [end.join(part) for part in expected if part]


def test_it_is_part_of_what_the_data_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\nthree\n")
    opened = {cut: open_documents(path, text_documents=cut, **TEXT) for cut in ("line", "blank-line", "file")}
    assert {cut: len(found) for cut, found in opened.items()} == {"line": 4, "blank-line": 2, "file": 1}
    assert len({found.fingerprint() for found in opened.values()}) == 3
    assert opened["line"].text_settings == {"tokenizer": "bytes", "loss_on": "all"}  # as before there was a choice
    assert opened["file"].text_settings["text_documents"] == "file"


def test_what_is_no_text_has_no_such_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="text_documents: got 'file', but no text files"):
        open_documents(path, text_documents="file", **TEXT)
    with pytest.raises(DataError, match="text_documents: got 'page'; expected one of line, blank-line, file"):
        open_documents(path, text_documents="page", **TEXT)


def test_short_lines_are_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("x" * (SHORT - 1) + "\n" + "y" * (SHORT - 1) + "\n\n" + "z" * 100 + "\n")
    data = open_documents(path, **TEXT)
    said, warning = describe_documents(data, data.lengths())
    assert said == f"{path}: 4 documents, median length {SHORT - 1} tokens, one per line"
    assert "--text-documents blank-line" in warning
    path.write_text("x" * SHORT + "\n" + "y" * SHORT + "\n")
    data = open_documents(path, **TEXT)
    assert describe_documents(data, data.lengths()) == [
        f"{path}: 2 documents, median length {SHORT} tokens, one per line"
    ]
    data = open_documents([[1, 2], [3]])
    assert describe_documents(data, data.lengths()) == ["the data in memory: 2 documents, median length 1 token"]
    assert describe_documents(data, np.zeros(2, np.int32)) == [
        "the data in memory: 2 documents, median length 0 tokens"
    ]


@pytest.fixture(scope="module")
def given_(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A teacher and a book whose lines are wrapped, as arguments."""
    folder = tmp_path_factory.mktemp("wrapped")
    saved(folder, "llama", vocab_size=300)
    tokenizer_of().save_pretrained(folder / "llama")
    words = random.Random(0)
    book = ["".join(words.choices(WORDS, k=4)) for _ in range(40)]
    (folder / "book.txt").write_text("\n".join("\n".join(book[i : i + 10]) + "\n" for i in range(0, 40, 10)))
    small = "--k 8 --draws 4 --context 64 --shard-positions 512 --batch-tokens 256"
    return ["--teacher", str(folder / "llama"), "--data", str(folder / "book.txt"), *small.split()]


def test_capture_says_it_and_keeps_to_it(given_: list[str], tmp_path: Path, capfd: Any) -> None:
    assert cli.main(["capture", *given_, "--out", str(tmp_path / "lines")]) == 0
    told = capfd.readouterr().err
    assert "book.txt: 43 documents, " in told
    assert "warning: half of the lines of " in told
    paragraphs = ["--out", str(tmp_path / "paragraphs"), "--text-documents", "blank-line"]
    assert cli.main(["capture", *given_, *paragraphs]) == 0
    told = capfd.readouterr().err
    assert "book.txt: 4 documents, " in told
    assert "tokens, one per paragraph\n" in told
    assert "warning" not in told
    assert len(open_cache(tmp_path / "paragraphs").sequences([0])["tokens"]) > 20
    # another cut is other data
    assert cli.main(["capture", *given_, "--out", str(tmp_path / "paragraphs")]) == 1
    assert "blank-line" in capfd.readouterr().err


def test_plan_says_it(given_: list[str], capfd: Any) -> None:
    assert cli.main(["plan", *given_, "--seconds", "0.1"]) == 0
    out, told = capfd.readouterr()
    assert "book.txt: 43 documents," in " ".join(out.split())
    assert "--text-documents blank-line" in told
    assert cli.main(["plan", *given_, "--seconds", "0.1", "--text-documents", "file", "--json"]) == 0
    assert "1 document, " in json.loads(capfd.readouterr().out)["data"][0]


def test_in_python(given_: list[str], tmp_path: Path, capfd: Any) -> None:
    settings = {"k": 8, "draws": 4, "context": 64, "shard_positions": 512, "held_out": 0.0}
    report = fastkd.capture(given_[1], given_[3], tmp_path, text_documents="file", progress="lines", **settings)
    assert report.plan["documents"] == 1
    assert "one per file" in capfd.readouterr().err
