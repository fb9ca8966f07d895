"""Formats of text data: the same documents from each, in any order, and what is not clear refused in one sentence."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastkd.data import byte_files, csv_files, json_files, lines
from fastkd.data.documents import describe_documents, open_documents
from fastkd.data.load import COMPLETIONS, detect_kind, load_documents
from fastkd.data.sources import open_source
from fastkd.errors import DataError

TEXTS = [
    "a cat",
    "Ärger, 猫",
    'he said "no"',
    "two\nlines, and a comma",
    "",
    "tab\there",
    *(f"number {i}" for i in range(40)),
]
ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]
SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]},
    {"id": "b", "conversations": [{"from": "system", "value": "brief"}, {"from": "user", "value": "hi"}]},
]
PAIRS = [{"prompt": "The sky is", "completion": " blue"}, {"prompt": "", "completion": "x"}]
CHAT_PAIRS = [
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "hello"}]},
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def template(messages: list[dict[str, Any]], ask: bool) -> str:
    return "".join(f"<{m['role']}>{m['content']}|" for m in messages) + ("<assistant>" if ask else "")


TEXT: dict[str, Any] = {"tokenizer": encode, "tokenizer_fingerprint": "bytes"}
CHAT: dict[str, Any] = {**TEXT, "template": template, "template_fingerprint": "angles"}


def json_text(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(values: list[str], separator: str = ",") -> str:
    quoted = ('"' + value.replace('"', '""') + '"' for value in values)
    return f"n{separator}text\r\n" + "".join(f"{i}{separator}{value}\r\n" for i, value in enumerate(quoted))


def written(path: Path, text: str) -> Path:
    data = text.encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[:99]) + gzip.compress(data[99:]))  # two members, as of `cat a.gz b.gz`
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


ROWS = [{"n": i, "text": text} for i, text in enumerate(TEXTS)]
MAKERS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda d: written(d / "a.csv", csv_text(TEXTS)),
    "a.tsv": lambda d: written(d / "a.tsv", csv_text(TEXTS, "\t")),
    "a.csv of a spreadsheet": lambda d: written(
        d / "a.csv", "\ufeff" + csv_text(TEXTS).replace("\r\n3,", "\r\n\r\n3,")
    ),
    "a.csv.gz": lambda d: written(d / "a.csv.gz", csv_text(TEXTS)),
    "a.jsonl.gz": lambda d: written(d / "a.jsonl.gz", json_text(ROWS)),
    "a.jsonl.zst": lambda d: written(d / "a.jsonl.zst", json_text(ROWS)),
    "an array": lambda d: written(d / "a.json", json.dumps(ROWS, indent=2)),
    "an array on one line": lambda d: written(d / "a.json", json.dumps(ROWS, ensure_ascii=False)),
    "dictionaries": lambda d: ROWS,
}


@pytest.mark.parametrize("name", MAKERS)
def test_any_row_from_every_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (byte_files, lines):  # some bytes at a time, so that rows span several reads
        monkeypatch.setattr(module, "READ_BYTES", 64)
    made = MAKERS[name](tmp_path)
    documents = open_documents(made, **TEXT)
    expected = [encode(text) for text in TEXTS]
    assert documents.lengths().tolist() == [len(ids) for ids in expected]
    found = documents.read(range(len(TEXTS)))
    assert [part.tolist() for part in np.split(found.tokens, found.lengths.cumsum()[:-1])] == expected
    for number in (30, 3, 45, 0, 45, 12):  # as a capture that resumes, or a training that shuffles
        assert documents[number].tokens.tolist() == expected[number], number
    assert documents.fingerprint() == open_documents(made, **TEXT).fingerprint()
    with pytest.raises(DataError, match=r"there is no column 'texts'\. It has 'n', 'text'"):
        open_documents(made, column="texts", **TEXT)


def test_a_folder_of_source_files_is_a_document_per_file(tmp_path: Path) -> None:
    for name, text in {
        "b.py": "b = 1\n",
        "a/a.c": "int a;\n",
        "README.md": "# It\n",
        ".git/x.py": "no",
        "x.bin": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    documents = open_documents(tmp_path, **TEXT)
    assert [documents.where(i) for i in range(3)] == [f"{tmp_path}/{name}" for name in ("README.md", "a/a.c", "b.py")]
    assert bytes(documents.read([2, 1]).tokens.tolist()) == b"b = 1int a;"
    assert documents.text_settings["text_documents"] == "file"
    assert describe_documents(documents, documents.lengths())[0].endswith("one per file")
    assert len(open_documents(f"{tmp_path}/**/*.py", **TEXT)) == 2
    (tmp_path / "requirements.txt").write_text("numpy\n")
    with pytest.raises(DataError, match=r"got data \(requirements.txt\) and source files \(a/a\.c\); expected"):
        open_documents(tmp_path, **TEXT)
    text, code = tmp_path / "requirements.txt", tmp_path / "b.py"
    assert len(open_documents([text, code], text_documents="file", **TEXT)) == 2
    with pytest.raises(DataError, match=r"b\.py is a source file and .*s\.txt is not.*--text-documents file"):
        open_documents([text, code], **TEXT)
    with pytest.raises(DataError, match="plain text, which has no columns"):
        open_documents(code, column="text", **TEXT)


def test_a_folder_of_data_is_read_as_it_was(tmp_path: Path) -> None:
    """A folder that held data before there were more formats has the same documents, and so the same fingerprint."""
    table = pa.table({"text": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    before = open_documents(tmp_path, **TEXT).fingerprint()
    (tmp_path / "README.md").write_text("about it")
    documents = open_documents(tmp_path, **TEXT)
    assert len(describe_documents(documents, documents.lengths())) == 1
    for name in ("load.py", "more.csv", "more.jsonl.gz"):
        (tmp_path / name).write_text("n,text\n1,x\n")
    documents = open_documents(tmp_path, **TEXT)
    assert documents.fingerprint() == before
    note = describe_documents(documents, documents.lengths())[1]
    assert note.startswith(f"note: 3 other files of {tmp_path} are not read (load.py, …)")


def test_fingerprints_do_not_move(tmp_path: Path) -> None:
    """A capture continues with the data that it was begun with by an older version."""
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\nthree\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    chats = b'{"messages": [{"role": "user", "content": "hi"}]}\n'
    (tmp_path / "c.jsonl").write_bytes(chats)
    (tmp_path / "i.jsonl").write_bytes(b'{"input_ids": [1, 2]}\n{"input_ids": []}\n')
    found = {
        "text": open_documents(tmp_path / "a.txt", **TEXT),
        "paragraphs": open_documents(tmp_path / "a.txt", text_documents="blank-line", **TEXT),
        "json": open_documents(tmp_path / "a.jsonl", **TEXT),
        "chats": open_documents(tmp_path / "c.jsonl", **CHAT, loss_on="assistant"),
        "ids": open_documents(tmp_path / "i.jsonl"),
        "memory": open_documents([[1, 2], [], [3]]),
        "texts": open_documents(["one", "two"], **TEXT),
    }
    assert {name: documents.fingerprint()[:16] for name, documents in found.items()} == FINGERPRINTS


FINGERPRINTS = {
    "text": "852c6d4c7fec2747",
    "paragraphs": "f2db1392c1937038",
    "json": "5a8a73426b7b0089",
    "chats": "0279a3c2d3aaf8ca",
    "ids": "fe29fd433ff7e36f",
    "memory": "b0b27bde3839e9e3",
    "texts": "8f1cfcde360ea2e0",
}


@pytest.mark.parametrize("holder", ["lines", "array", "parquet", "memory", "gz", "csv"])
def test_conversations_of_several_shapes(holder: str, tmp_path: Path) -> None:
    def held(rows: list[dict[str, Any]]) -> Any:
        if holder == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
            return tmp_path / "a.parquet"
        if holder == "csv":
            cells = [list(rows[0]), *(list(row.values()) for row in rows)]
            return written(tmp_path / "a.csv", "".join(",".join(f'"{x}"' for x in row) + "\n" for row in cells))
        if holder == "memory":
            return rows
        if holder == "array":
            return written(tmp_path / "a.json", json.dumps(rows, indent=1))
        return written(tmp_path / ("a.jsonl.gz" if holder == "gz" else "a.jsonl"), json_text(rows))

    def texts(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        documents = open_documents(held(rows), **options)
        return [bytes(documents[i].tokens.tolist()).decode() for i in range(len(documents))]

    assert texts(ALPACA, **CHAT) == ["<user>Add.\n\n1 2|<assistant>3|", "<user>Say hi.|<assistant>hi|"]
    assert texts(PAIRS, **TEXT) == ["The sky is blue", "x"]
    assert detect_kind(open_source(held(ALPACA), None).columns) == "messages"
    assert detect_kind(open_source(held(PAIRS), None).columns) == COMPLETIONS
    if holder == "csv":
        return
    assert texts(SHAREGPT, **CHAT) == ["<user>2+2|<assistant>4|", "<system>brief|<user>hi|"]
    assert texts(CHAT_PAIRS, **CHAT) == ["<user>hi|<assistant>hello|"]
    replies = open_documents(held(ALPACA), **CHAT, loss_on="assistant")[0]
    assert bytes(replies.tokens[np.flatnonzero(replies.loss_mask) + 1].tolist()) == b"3|"


def test_positions_of_a_completion_count() -> None:
    def both(prompt: str, completion: str) -> tuple[list[int], int]:
        return encode(prompt + completion + "$"), len(prompt)

    documents = open_documents(PAIRS, **TEXT, completions=both, loss_on="assistant")
    for number, expected in ((0, b" blue$"), (1, b"$")):  # nothing comes before the first token
        found = documents[number]
        assert bytes(found.tokens[np.flatnonzero(found.loss_mask) + 1].tolist()) == expected
    whole = open_documents(PAIRS, **TEXT, completions=both, loss_on="all")[0]
    assert whole.loss_mask.all()
    assert whole.tokens.tolist() == encode("The sky is blue")
    assert documents.fingerprint() != open_documents(PAIRS, **TEXT, completions=both).fingerprint()
    with pytest.raises(DataError, match="expected messages, or prompts with completions"):
        load_documents(["a"], loss_on="assistant", vocab_size=300)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text;label\na;b\n", r"got one column, 'text;label'; expected names with ',' between them"),
        ("a.csv", "a,text\n1,x\n2\n", r"row 1 \(from 0, after the names\): got 1 values; expected 2"),
        ("a.csv", 'a,text\n1,"x\n', r"a\.csv, line 3?2?: got a damaged record"),
        ("a.csv", "", "got no first record"),
        ("a.csv", "input_ids\n[1]\n", "whose values are text; expected token ids in lists"),
        ("a.csv", "a,b\n1,2\n", "which column holds the documents. It has 'a', 'b'"),
        (
            "a.json",
            '[{"text": "a"}]\n[{"text": "b"}]',
            r"got '\[\{\"text\": \"b\"\}\]' after the end of the array; expected",
        ),
        ("a.json", "[] 5", r"got '5' after the end of the array; expected one array of JSON objects"),
        ("a.json", '[{"text": "a"}, 5]', r"element 1 \(from 0\): got '5\]'; expected an array of JSON objects"),
        ("a.json", '[{"text": "a"}, {"tex', r"element 1 \(from 0\): got invalid JSON"),
        ("a.json", '[{"text": "a"}', r"element 1 \(from 0\): got the end of the file"),
        ("a.json", '[{"text": "a"}, {"b": 1}]', r"element 1 \(from 0\): got an object with keys 'b'; expected 'text'"),
        (
            "a.jsonl",
            json_text([{"instruction": "x", "output": None}]),
            "line 1: got null in column 'output'; expected text",
        ),
        ("a.jsonl", json_text([{"conversations": [{"from": "alien", "value": "x"}]}]), "got a message from 'alien'"),
        ("a.jsonl", json_text([{"conversations": [{"from": "gpt", "value": 1}]}]), "got int as its value"),
        ("a.jsonl", json_text([{"prompt": "x", "completion": [{}]}]), "got list in column 'completion'; expected text"),
        ("a.xml.gz", "x", "got an unknown suffix; expected one of .parquet"),
    ],
)
def test_what_is_none_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as raised:
        open_documents(path, **(CHAT if "conversations" in text or "instruction" in text else TEXT)).lengths()
    assert "\n" not in str(raised.value)


def test_damaged_compressed_files_are_named(tmp_path: Path) -> None:
    for suffix in ("gz", "zst"):
        path = written(tmp_path / f"a.jsonl.{suffix}", json_text(ROWS))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: .*cannot be read as text \(Truncated compressed"):
            open_documents(path, **TEXT)
        path.write_bytes(b"")
        with pytest.raises(DataError, match="got an empty file"):
            open_documents(path, **TEXT)


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    ids = written(tmp_path / "a.jsonl", json_text([{"input_ids": [1]}]))
    texts = written(tmp_path / "b.jsonl", json_text([{"text": "x"}]))
    with pytest.raises(DataError, match=r"b\.jsonl: got text, and ids in .*a\.jsonl; expected one kind of documents"):
        load_documents([ids, texts], vocab_size=300)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"got a folder among the matches"):
        open_documents(f"{tmp_path}/*", **TEXT)


def test_a_long_array_is_not_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_files, "READ_BYTES", 1000)
    longest = 0
    parse = json_files.json.JSONDecoder.raw_decode

    def measured(self: Any, text: str, idx: int = 0) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return parse(self, text, idx)

    monkeypatch.setattr(json_files.json.JSONDecoder, "raw_decode", measured)
    path = written(tmp_path / "a.json", json.dumps([{"text": "x" * 100}] * 500))
    assert len(open_documents(path, **TEXT)) == 500
    assert longest < 2200


@pytest.mark.parametrize("array", [False, True])
def test_an_optional_key_that_only_some_objects_have_is_read(tmp_path: Path, array: bool) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    for name, some in (("first.json", rows), ("last.json", rows[::-1])):
        path = tmp_path / name
        path.write_text(json.dumps(some) if array else "\n".join(map(json.dumps, some)))
        (column,) = open_source(path, None).columns
        asked = {row[0]["content"] for row in column.read(0, 2)}
        assert asked == {"a", "c\n\nd"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_each_row_is_parsed_once_for_all_its_columns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(20)]
    if name == "a.csv":
        text = "instruction,input,output\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        text = json.dumps(rows) if name == "a.json" else json_text(rows)
    (column,) = open_source(written(tmp_path / name, text), None).columns
    parsed: list[tuple[int, int]] = []
    for kind in (json_files.JsonColumn, csv_files.CsvColumn):

        def counted(self: Any, start: int, stop: int, parse: Any = kind._parse) -> Any:
            parsed.append((start, stop))
            return parse(self, start, stop)

        monkeypatch.setattr(kind, "_parse", counted)
    for start, stop in ((0, 8), (8, 20), (3, 5)):
        found = column.read(start, stop)
        assert [row[0]["content"] for row in found] == [f"i{n}" for n in range(start, stop)]
    assert parsed == [(0, 8), (8, 20), (3, 5)]


def test_a_column_of_messages_that_holds_others_is_refused(tmp_path: Path) -> None:
    for name in ("conversations", "messages"):
        path = written(tmp_path / "a.jsonl", json_text([{name: []}, {name: [5]}]))
        with pytest.raises(DataError, match=f"in column '{name}'; expected messages"):
            load_documents(path, vocab_size=300)
    found = load_documents(written(tmp_path / "b.jsonl", json_text([{"input_ids": [5]}])), vocab_size=300)
    assert found[0].tokens.tolist() == [5]
