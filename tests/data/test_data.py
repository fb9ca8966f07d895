"""Documents from every format: the same tokens whatever holds them, any of them at any time, and bad input named."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.capture.rows import read_shard_rows
from fastkd.capture.window_plan import WindowPlanSettings, make_window_plan
from fastkd.data.chat import InvalidChat, chat_tokens
from fastkd.data.documents import Documents, open_documents
from fastkd.data.lengths import lengths_from_npz, lengths_to_npz
from fastkd.errors import DataError

generator = np.random.default_rng(0)
IDS = [generator.integers(0, 1000, n).tolist() for n in generator.integers(0, 9, 60)]
TEXTS = ["", "a cat", "Ärger, 猫 🐈", *("".join(map(chr, 32 + np.array(ids, int) % 90)) for ids in IDS)]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one?"}],
    [],
    [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4", "note": "sure"},
        {"role": "user", "content": "+1"},
        {"role": "assistant", "content": "5"},
    ],
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def template(messages: list[dict[str, Any]], ask: bool) -> str:
    said = "".join(f"<{m['role']}>{m['content']}{m.get('note', '')}|" for m in messages)
    return said + ("<assistant>" if ask else "")


TEXT = {"tokenizer": encode, "tokenizer_fingerprint": "bytes"}
CHAT = {**TEXT, "template": template, "template_fingerprint": "angles"}


class FakeDataset:
    """As much of `datasets.Dataset` as is used: the rows are a choice of the table's, as after a shuffle."""

    def __init__(self, table: pa.Table, arrow: bool = False) -> None:
        self.table, self.arrow = table, arrow
        self.column_names = table.column_names

    def __len__(self) -> int:
        return len(self.table)

    def with_format(self, name: str) -> "FakeDataset":
        assert name == "arrow"
        return FakeDataset(self.table, True)

    def __getitem__(self, rows: slice) -> pa.Table:
        assert self.arrow
        return self.table[rows]


def table_of(values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"other": np.arange(len(values)) / 2, "documents": pa.array(values, kind)})


def parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def arrow(path: Path, table: pa.Table, new: Any = pa.ipc.new_file, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def json_lines(path: Path, values: list[Any], end: str = "\n") -> Path:
    lines = [json.dumps({"n": i, "documents": value}) for i, value in enumerate(values)]
    path.write_bytes((end.join(lines)).encode())
    return path


COLUMN = {"column": "documents"}
Maker = Callable[[Path, list[Any]], tuple[Any, dict[str, Any]]]
ANY: dict[str, Maker] = {
    "parquet": lambda d, v: (parquet(d / "a.parquet", table_of(v), row_group_size=7), COLUMN),
    "parquet, one group": lambda d, v: (str(parquet(d / "a.pq", table_of(v))), COLUMN),
    "arrow file": lambda d, v: (arrow(d / "a.arrow", table_of(v)), COLUMN),
    "arrow file, compressed": lambda d, v: (arrow(d / "a.feather", table_of(v), compression="zstd"), COLUMN),
    "arrow stream": lambda d, v: (arrow(d / "a.arrow", table_of(v), pa.ipc.new_stream), COLUMN),
    "json lines": lambda d, v: (json_lines(d / "a.jsonl", v), COLUMN),
    "json lines, CRLF": lambda d, v: (json_lines(d / "a.json", v, "\r\n"), COLUMN),
    "table": lambda d, v: (pa.concat_tables([table_of(v[:9]), table_of(v[9:])], promote_options="default"), COLUMN),
    "Dataset": lambda d, v: (FakeDataset(table_of(v)), COLUMN),
    "list": lambda d, v: (v, {}),
    "tuple": lambda d, v: (tuple(v), {}),
    "arrow array": lambda d, v: (pa.array(v), {}),
}
ONLY_IDS: dict[str, Maker] = {
    "list of arrays": lambda d, v: ([np.array(x, np.uint16) for x in v], {}),
    "large list": lambda d, v: (parquet(d / "a.parquet", table_of(v, pa.large_list(pa.uint16()))), COLUMN),
    "conventional name": lambda d, v: (pa.table({"x": range(len(v)), "input_ids": pa.array(v)}), {}),
    "two files": lambda d, v: (
        [parquet(d / "b.parquet", table_of(v[:20])), json_lines(d / "a.jsonl", v[20:])],
        COLUMN,
    ),
}
ONLY_TEXT: dict[str, Maker] = {
    "text": lambda d, v: (_written(d / "a.txt", "\n".join(v) + "\n"), {}),
    "text, no last newline": lambda d, v: (_written(d / "a.txt", "\n".join([*v, "x"])[:-2]), {}),
    "text, CRLF": lambda d, v: (_written(d / "a.txt", "\r\n".join(v) + "\r\n"), {}),
    "dictionary": lambda d, v: (arrow(d / "a.arrow", pa.table({"t": pa.array(v).dictionary_encode()})), {}),
    "large string": lambda d, v: (pa.table({"t": pa.array(v, pa.large_string())}), {}),
}


def _written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def cut(read: Any) -> list[list[int]]:
    return [part.tolist() for part in np.split(read.tokens, np.cumsum(read.lengths)[:-1])] if len(read.lengths) else []


def check(documents: Documents, expected: list[list[int]]) -> None:
    """All of them, one at a time backwards, and the lengths."""
    assert len(documents) == len(expected)
    lengths = documents.lengths()
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(ids) for ids in expected]
    read = documents.read(range(len(expected)))
    assert read.tokens.dtype == np.int32
    assert cut(read) == expected
    assert read.loss_mask.all()
    for number in reversed(range(0, len(expected), 5)):
        assert documents[number].tokens.tolist() == expected[number]
    some = [3, 4, 5, 41, 12, 13, 13]
    assert cut(documents.read(some)) == [expected[i] for i in some]
    assert len(documents.read([]).tokens) == 0


@pytest.mark.parametrize("name", [*ANY, *ONLY_IDS])
def test_ids_from_every_format(name: str, tmp_path: Path) -> None:
    source, options = (ANY | ONLY_IDS)[name](tmp_path, IDS)
    check(open_documents(source, vocab_size=1000, **options), IDS)


@pytest.mark.parametrize("name", [*ANY, *ONLY_TEXT])
def test_text_from_every_format(name: str, tmp_path: Path) -> None:
    texts = [*TEXTS, "end"]
    source, options = (ANY | ONLY_TEXT)[name](tmp_path, texts)
    check(open_documents(source, **TEXT, **options), [encode(text) for text in texts])


@pytest.mark.parametrize("name", [n for n in ANY if n != "table"])
@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_conversations_from_every_format(name: str, loss_on: str, tmp_path: Path) -> None:
    source, options = ANY[name](tmp_path, CHATS)
    documents = open_documents(source, **CHAT, **options, loss_on=loss_on)
    read = documents.read(range(4))
    assert cut(read) == [encode(template(chat, False)) for chat in CHATS]
    assert documents.lengths().tolist() == read.lengths.tolist()
    # a row counts if the token after it is part of a reply
    counted = np.split(np.roll(read.loss_mask, 1), np.cumsum(read.lengths)[:-1])
    tokens = np.split(read.tokens, np.cumsum(read.lengths)[:-1])
    replies = [bytes(t[m].astype(np.uint8)).decode() for t, m in zip(tokens, counted, strict=True)]
    if loss_on == "assistant":
        assert replies == ["hello|", "", "", "4sure|5|"]
    else:
        assert read.loss_mask.all()


def test_fixed_size_lists_and_a_matrix(tmp_path: Path) -> None:
    matrix = np.arange(300).reshape(60, 5)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 5)
    for source in (matrix, fixed, fixed.slice(0), parquet(tmp_path / "a.parquet", pa.table({"ids": fixed}))):
        check(open_documents(source), matrix.tolist())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Documents]:
    folder = tmp_path_factory.mktemp("files")
    return [open_documents(s, **o) for s, o in (ANY[n](folder, IDS) for n in ("parquet", "arrow file", "json lines"))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 59), max_size=12))
def test_any_documents_in_any_order(files: list[Documents], numbers: list[int]) -> None:
    for documents in files:
        assert cut(documents.read(numbers)) == [IDS[i] for i in numbers]


def test_large_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """What is decoded at a time follows from the rows' size; the rows do not."""
    long = [generator.integers(0, 1000, 300_000).tolist() for _ in range(12)]
    path = parquet(tmp_path / "a.parquet", table_of(long, pa.list_(pa.int32())))
    documents = open_documents(path, column="documents")
    assert documents.lengths().tolist() == [300_000] * 12
    assert documents[7].tokens.tolist() == long[7]
    assert documents[2].tokens.tolist() == long[2]


def test_folders_and_patterns(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        parquet(tmp_path / f"{number}.parquet", pa.table({"ids": [[number]]}))
    (tmp_path / "README.md").write_text("not data")
    for source in (tmp_path, str(tmp_path), f"{tmp_path}/*.parquet", tmp_path / "?.parquet"):
        assert open_documents(source).read([0, 1, 2]).tokens.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"\*\.arrow: there are no files"):
        open_documents(f"{tmp_path}/*.arrow")


def test_the_fingerprint_follows_all_that_decides_tokens(tmp_path: Path) -> None:
    def of(source: Any, **options: Any) -> str:
        return open_documents(source, **options).fingerprint()

    (tmp_path / "there").mkdir()
    table = pa.table({"a": ["x", "y"], "b": ["x", "y"]})
    one, moved = parquet(tmp_path / "a.parquet", table), parquet(tmp_path / "there" / "a.parquet", table)
    renamed = parquet(tmp_path / "b.parquet", table)
    assert of(one, column="a", **TEXT) == of(moved, column="a", **TEXT)
    other = {"tokenizer": encode, "tokenizer_fingerprint": "other"}
    found = {of(one, column="a", **TEXT), of(one, column="b", **TEXT), of(renamed, column="a", **TEXT)}
    found |= {of(one, column="a", **other), of([one, renamed], column="a", **TEXT)}
    assert len(found) == 5
    chats = json_lines(tmp_path / "a.jsonl", CHATS)
    kinds = {of(chats, column="documents", **CHAT, loss_on=loss_on) for loss_on in ("all", "assistant")}
    kinds.add(of(chats, column="documents", **{**CHAT, "template_fingerprint": "round"}))
    assert len(kinds) == 3
    json_lines(chats, CHATS[1:])
    assert of(chats, column="documents", **CHAT) not in kinds


def test_the_fingerprint_of_memory_is_of_its_values() -> None:
    same = {open_documents(s).fingerprint() for s in (IDS, pa.array(IDS), [np.array(x, np.int16) for x in IDS])}
    assert len(same) == 1
    for change in ([*IDS, [1]], [[*IDS[0], 5], *IDS[1:]], [IDS[0] + IDS[1], [], *IDS[2:]]):
        assert open_documents(change).fingerprint() not in same
    assert open_documents(["a"], **TEXT).fingerprint() != open_documents(["b"], **TEXT).fingerprint()


def test_lengths_are_kept() -> None:
    lengths = open_documents(IDS).lengths()
    kept = lengths_to_npz(lengths, "one")
    found = lengths_from_npz(kept, "one", "there")
    assert found is not None
    assert found.tolist() == lengths.tolist()
    assert lengths_from_npz(kept, "two", "there") is None
    for broken in (kept[:40], b"", b"no zip"):
        with pytest.raises(DataError, match="there: no lengths can be read"):
            lengths_from_npz(broken, "one", "there")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.utils.progress.LINE_SECONDS", 0.0)
    documents = open_documents(IDS)
    documents.lengths()
    documents.fingerprint()
    assert capsys.readouterr() == ("", "")
    documents.lengths(progress=True)
    documents.fingerprint(progress=True)
    captured = capsys.readouterr()
    assert not captured.out
    assert "documents (100.0%)" in captured.err
    assert "fingerprint" in captured.err


BAD: dict[str, tuple[list[Any] | pa.Array, dict[str, Any], str]] = {
    "an id too large": ([[1, 2], [3, 49152]], {"vocab_size": 49152}, r"{1}.*got id 49152 at position 1"),
    "a negative id": ([[1, 2], [], [-3]], {}, r"{2}.*got id -3 at position 0"),
    "null": ([[1], None, [2]], {}, r"{1}.*got null"),
    "null in it": ([[1], [], [2, None]], {}, r"{2}.*got null at position 1"),
    "floats": ([[1], [2.5]], {}, r"{.}.*(double|float at position).*of integers"),
    "text without a tokenizer": (["one", "two"], {}, r"{0}.*got str.*of integers, or a tokenizer"),
    "numbers": ([1, 2], {}, r"{0}.*expected .*integers"),
    "lists of lists": ([[[1]], [[2]]], {}, r"{0}.*got .*of integers"),
    "null for text": (["one", None], TEXT, r"{1}.*got null"),
    "ids for text": ([[1], [2]], TEXT, r"{0}.*got list; expected text.*leave it out"),
    "text for messages": (["one"], CHAT, r"{0}.*got str; expected messages"),
    "null for messages": ([CHATS[0], None], CHAT, r"{1}.*got null"),
    "no role": ([CHATS[0], [{"content": "x"}]], CHAT, r"{1}.*without a role"),
    "no messages": ([["a", "b"]], CHAT, r"{0}.*got str without a role"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["parquet", "arrow file", "json lines", "Dataset", "list"])
def test_bad_values_are_named(name: str, form: str, tmp_path: Path) -> None:
    values, options, message = BAD[name]
    source, named = ANY[form](tmp_path, values)
    documents = open_documents(source, **options, **named)
    first = 1 if form == "json lines" else 0
    for row in range(3):
        message = message.replace(f"{{{row}}}", rf"(row|line|document) {row + first}\b")
    message = message.replace("{.}", r"(row|line|document) \d")
    for read in (documents.lengths, lambda: documents.read(range(len(values)))):
        with pytest.raises(DataError, match=message) as error:
            read()
        if form not in ("list", "Dataset"):
            assert str(tmp_path) in str(error.value)
        if form != "list":
            assert "column 'documents'" in str(error.value)


def test_a_tokenizer_that_fails_or_gives_no_ids(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.txt", "one\ntwo")

    def fails(text: str) -> list[int]:
        if text == "two":
            raise RuntimeError("no such word")
        return [1]

    for tokenizer, message in (
        (fails, "line 2: the tokenizer failed: RuntimeError: no such word"),
        (lambda text: [0.5], "line 1: from the tokenizer: got float at position 0"),
        (lambda text: [[1]], "line 1: from the tokenizer: got int64 of 2 dimensions"),
        (lambda text: [70], "line 1: got id 70 at position 0; expected 0 to 63"),
    ):
        documents = open_documents(path, tokenizer=tokenizer, tokenizer_fingerprint="x", vocab_size=64)
        with pytest.raises(DataError, match=message):
            documents.lengths()


@pytest.mark.parametrize("name", ["parquet", "arrow file", "arrow stream", "arrow file, compressed", "json lines"])
def test_truncated_files_are_named(name: str, tmp_path: Path) -> None:
    source, options = ANY[name](tmp_path, IDS)
    whole = source.read_bytes()
    for kept in (len(whole) - 3, len(whole) // 2, 9):
        source.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=source.name):
            open_documents(source, **options).lengths()
    # an empty JSON file is a file without documents
    source.write_bytes(b"")
    if name != "json lines":
        with pytest.raises(DataError, match=r"fetch it again"):
            open_documents(source, **options)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", table_of(IDS), row_group_size=20, compression="zstd")
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    documents = open_documents(path, column="documents")
    assert documents[3].tokens.tolist() == IDS[3]
    with pytest.raises(DataError, match=r"a\.parquet: rows \d+ to \d+: cannot be read as Parquet"):
        documents[25]
    with pytest.raises(DataError, match=r"a\.parquet: rows"):
        documents.lengths()


def test_damaged_values_are_named(tmp_path: Path) -> None:
    """Offsets that lead outside, and text that is none: Arrow takes both from a file unseen."""
    path = arrow(tmp_path / "a.arrow", pa.table({"ids": pa.array([[1, 2], [3, 4, 5]], pa.list_(pa.int32()))}))
    offsets = np.array([0, 2, 5], np.int32).tobytes()
    path.write_bytes(path.read_bytes().replace(offsets, np.array([0, 2**30, 5], np.int32).tobytes()))
    with pytest.raises(DataError, match=r"a\.arrow, row 0 .*damaged"):
        open_documents(path).lengths()
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe"))
    path = parquet(tmp_path / "a.parquet", pa.table({"text": texts}))
    with pytest.raises(DataError, match=r"a\.parquet, row 0 .*one of the 1 after it is damaged .*UTF8"):
        open_documents(path, **TEXT).lengths()


def test_lines_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"documents": [1]}\n'
    for line, message in (
        (b"{oops}\n", "line 2: got invalid JSON"),
        (b"\n" + good, "line 2: got an empty line"),
        (b"[1, 2]\n", "line 2: got list; expected a JSON object"),
        (b'{"other": [1]}\n', "line 2: got an object with keys 'other'; expected 'documents'"),
        (b'{"documents": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"documents": [1', "line 2: got invalid JSON"),
    ):
        path.write_bytes(good + line)
        with pytest.raises(DataError, match=message):
            open_documents(path, column="documents").lengths()
    text = tmp_path / "a.txt"
    text.write_bytes(b"fine\n\xc3(\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: not UTF-8"):
        open_documents(text, **TEXT).lengths()
    documents = open_documents(_written(text, "one\ntwo\n"), **TEXT)
    _written(text, "one\n")
    with pytest.raises(DataError, match="changed after it was opened"):
        documents[1]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (pa.table({"a": [[1]]}), {"column": "b"}, "no column 'b'. It has 'a'"),
        (pa.table({"a": [[1]], "b": [[1]]}), {}, "which column holds the documents. It has 'a', 'b'"),
        (pa.table({"text": ["a"], "input_ids": [[1]]}), {}, "which column"),
        ("nowhere.csv", {}, "nowhere.csv: there is no such file"),
        ([[1]], {"column": "a"}, "column: got 'a'; list in memory has no columns"),
        ("nowhere.parquet", {}, "nowhere.parquet: there is no such file"),
        ("nowhere.jsonl", {}, "nowhere.jsonl: there is no such file"),
        ("nowhere.arrow", {}, "nowhere.arrow: there is no such file"),
        ("nowhere.xls", {}, "nowhere.xls: got an unknown suffix; expected one of .parquet"),
        (5, {}, "source: got int"),
        ({"a": [1]}, {}, "source: got dict"),
        ([[1]], {"vocab_size": 0}, "vocab_size: got 0"),
        ([[1]], {"vocab_size": 2.0}, "vocab_size: got 2.0"),
        ([[1]], {"loss_on": "assistant"}, "only messages have roles"),
        ([[1]], {"loss_on": "user"}, "loss_on: got 'user'"),
        ([[1]], {"tokenizer": encode}, "tokenizer_fingerprint: got '' with a tokenizer"),
        ([[1]], {"tokenizer_fingerprint": "x"}, "tokenizer_fingerprint: got 'x' without a tokenizer"),
        ([[1]], {"template": template, "template_fingerprint": "x"}, "template: got one without a tokenizer"),
        ([[1]], {**TEXT, "template": template}, "template_fingerprint: got '' with a template"),
    ],
)
def test_bad_arguments_are_named(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_documents(source, **options)


def test_numbers_that_are_not_there() -> None:
    for numbers in ([60], [-1], [2, 99]):
        with pytest.raises(DataError, match="there are 60, numbered from 0"):
            open_documents(IDS).read(numbers)


def test_what_is_no_single_dataset(tmp_path: Path) -> None:
    splits = FakeDataset(table_of(IDS))
    splits.column_names = {"train": ["a"], "test": ["a"]}  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"got a DatasetDict \(train, test\)"):
        open_documents(splits)
    with pytest.raises(DataError, match=r"a\.txt', is a file; expected Paths"):
        open_documents([str(_written(tmp_path / "a.txt", "x"))], **TEXT)
    with pytest.raises(DataError, match="plain text, which has no columns"):
        open_documents(_written(tmp_path / "a.txt", "x"), column="text", **TEXT)


def test_documents_may_all_be_empty(tmp_path: Path) -> None:
    assert len(open_documents([])) == 0
    assert open_documents([]).lengths().tolist() == []
    assert open_documents([[], []]).lengths().tolist() == [0, 0]
    assert open_documents(_written(tmp_path / "a.txt", ""), **TEXT).lengths().tolist() == []
    assert open_documents(_written(tmp_path / "a.txt", "\n\n"), **TEXT).lengths().tolist() == [0, 0]
    assert open_documents(parquet(tmp_path / "a.parquet", pa.table({"ids": [[1]]})[:0])).lengths().tolist() == []


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text("ab<é", max_size=3)}),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(messages)
def test_replies_and_nothing_else_count(chat: list[dict[str, Any]]) -> None:
    ids, counts = chat_tokens(chat, template, encode, "assistant")
    assert ids == chat_tokens(chat, template, encode, "all")[0] == encode(template(chat, False))
    after = [False, *counts[:-1]] if counts else []
    replies = bytes(i for i, c in zip(ids, after, strict=True) if c).decode()
    assert replies == "".join(f"{m['content']}|" for m in chat if m["role"] == "assistant")


def test_a_reply_is_tokenised_as_when_it_is_generated() -> None:
    """A tokenizer that joins spaces across the prompt's end would otherwise hide where the reply begins."""
    seen: list[str] = []

    def greedy(text: str) -> list[int]:
        seen.append(text)
        return [len(word) for word in text.split("|")]

    chat_tokens(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], template, greedy, "assistant"
    )
    assert seen == ["<user>a|<assistant>", "b|"]


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    def forgets(chat: list[dict[str, Any]], ask: bool) -> str:
        return template(chat[-1:], ask)

    chat = CHATS[3]
    assert chat_tokens(chat, forgets, encode, "all")[0] == encode("<assistant>5|")
    with pytest.raises(InvalidChat, match='Use loss_on="all"'):
        chat_tokens(chat, forgets, encode, "assistant")
    with pytest.raises(DataError, match=r"document 0 .*message 1: the template changes its text"):
        open_documents(
            [chat], **{**CHAT, "template": forgets, "template_fingerprint": "f"}, loss_on="assistant"
        ).lengths()


def test_a_long_document_is_tokenized_once_not_once_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.data.documents._LONG", 500)
    path = tmp_path / "books"
    path.mkdir()
    sizes = {"a": 40, "b": 9000, "c": 30, "d": 2000, "e": 700, "f": 20}
    for name, size in sizes.items():
        (path / f"{name}.txt").write_text(name * size)
    tokenized: list[str] = []

    def tokenizer(text: str) -> list[int]:
        tokenized.append(text[0])
        return [ord(c) for c in text]

    documents = open_documents(path, text_documents="file", tokenizer=tokenizer, tokenizer_fingerprint="characters")
    settings = WindowPlanSettings(context=100, shard_positions=500, batch_tokens=1000)
    plan = make_window_plan(documents.lengths(), settings, "x")
    assert plan.shards > 20
    for order in (range(plan.shards), reversed(range(plan.shards))):
        tokenized.clear()
        for shard in order:
            rows = read_shard_rows(plan, documents, shard)
            assert {chr(c) for c in rows.inputs["tokens"]} == {"abcdef"[n] for n in rows.document.tolist()}
            assert len(documents._kept) <= 2
        assert all(tokenized.count(name) <= 1 for name in "bde")
        assert max(tokenized.count(name) for name in "acf") <= 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.arrow"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for source in (tmp_path / name, tmp_path, str(tmp_path / "*")):
        with pytest.raises(DataError, match="got a pipe or a device; expected a regular file"):
            open_documents(source)


def test_errors_name_no_credentials() -> None:
    place = "https://me:hunter22@host/data.parquet?signature=abcdef"
    with pytest.raises(DataError) as raised:
        open_documents(place)
    assert "host/data.parquet" in str(raised.value)
    assert "got a URL" in str(raised.value)
    assert not {"hunter22", "abcdef"} & set(re.split(r"\W", str(raised.value)))


FLIPS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_data import CHAT, TEXT
from fastkd.data.documents import open_documents
from fastkd.data.load import load_documents
from fastkd.errors import DataError
for name, column in json.loads(sys.argv[2]).items():
    path, good = Path(name), Path(name).read_bytes()
    noticed = tried = 0
    for place in range(0, len(good), int(sys.argv[3])):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        for options in (None, {"ids": {}, "text": TEXT, "chats": CHAT}[column]):
            tried += 1
            try:
                if options is None:
                    documents = load_documents(path, vocab_size=2000)
                else:
                    documents = open_documents(path, vocab_size=2000, **options)
                documents.lengths(), documents.read(range(len(documents)))
            except DataError:
                noticed += 1
    print(tried, noticed, flush=True)
"""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_a_flipped_bit_of_a_file_is_an_error_of_ours_or_none(every: int, tmp_path: Path) -> None:
    """No error of Arrow's, none of Python's, and no crash: in a process of its own. A bit of every n-th byte."""
    text, ids = pa.array(TEXTS[1:4]), pa.array(IDS[1:4])
    files = {
        "text.arrow": (pa.ipc.new_file, text, "text"),
        "dictionary.arrow": (pa.ipc.new_file, text.dictionary_encode(), "text"),
        "chats.arrow": (pa.ipc.new_file, pa.array(CHATS[:2]), "chats"),
        "stream.arrow": (pa.ipc.new_stream, ids, "ids"),
    }
    for name, (new, values, _) in files.items():
        table = pa.table({"it": values})
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    pq.write_table(pa.table({"it": ids}), tmp_path / "ids.parquet", store_schema=False)
    columns = {name: column for name, (*_, column) in files.items()} | {"ids.parquet": "ids"}
    sizes = [(tmp_path / name).stat().st_size for name in columns]
    given = json.dumps({str(tmp_path / name): column for name, column in columns.items()})
    code = [sys.executable, "-c", FLIPS, str(Path(__file__).parent), given, str(every)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), f"after {len(lines)} of {list(columns)}: {done.stderr[-3000:]}"
    for name, size, line in zip(columns, sizes, lines, strict=True):
        tried, noticed = map(int, line.split())
        assert tried == 2 * -(-size // every), name
        assert noticed > tried // 3, name


def test_a_source_that_ends_early_is_named_and_not_waited_for() -> None:
    class Shrunk(FakeDataset):
        def __len__(self) -> int:
            return len(self.table) + 5

        def with_format(self, name: str) -> FakeDataset:
            return Shrunk(self.table, True)

    documents = open_documents(Shrunk(pa.table({"documents": IDS})))
    with pytest.raises(DataError, match=r"the Dataset, row 60 \(from 0\): got no rows; expected 5"):
        documents.lengths()
