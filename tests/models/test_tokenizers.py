"""Tokenizers and what is read with them: the right ids of each kind of column, and no other tokenizer's."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hf_cases import SPECIAL, TEMPLATE, WORDS, saved, tokenizer_of

from fastkd.data.load import detect_kind, load_documents
from fastkd.data.sources import open_source
from fastkd.errors import DataError, TeacherError
from fastkd.models.tokenizers import Tokenizer, choose_tokenizer, load_tokenizer
from fastkd.teachers.hf import load_hf

END, BEGIN, TURN = range(3)
CHAT = [
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "over the dog"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "the other"},
]


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


# Text


def test_a_document_begins_and_ends_as_the_tokenizer_has_it() -> None:
    for bos in (False, True):
        backend = tokenizer_of(bos=bos)
        plain, whole = load_tokenizer(backend, append_eos=False), load_tokenizer(backend)
        ids = plain.encode("the fox")
        assert ids == [BEGIN] * bos + backend("the fox", add_special_tokens=False)["input_ids"]
        assert whole.encode("the fox") == [*ids, END]
        assert text_of(backend, whole.encode("Ärger, 猫 🐈")) == "<|begin|>" * bos + "Ärger, 猫 🐈<|end|>"
        # it is there already
        assert whole.encode("the fox<|end|>") == [*ids, END]
        # what is empty stays empty, so that it is counted and left out
        assert whole.encode("") == []
    assert load_tokenizer(tokenizer_of(eos_token=None)).encode("the fox") == ids[1:]


def test_long_texts_are_neither_cut_nor_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    backend = tokenizer_of(model_max_length=8)
    backend("the", truncation=True, max_length=8)  # which it remembers
    assert len(load_tokenizer(backend).encode("the fox " * 50)) > 100
    assert capfd.readouterr().err == ""


def test_a_conversation_has_the_special_tokens_of_its_template_alone() -> None:
    backend = tokenizer_of(bos=True)
    tokenizer = load_tokenizer(backend)
    text = tokenizer.template(CHAT[:1], True)
    assert text == "<|turn|>user\nthe fox?<|end|>\n<|turn|>assistant\n"
    ids = tokenizer.encode_chat(text)
    assert [i for i in ids if i < len(SPECIAL)] == [TURN, END, TURN]
    assert text_of(backend, ids) == text


# Which one it is


def test_fingerprints_are_of_contents(tmp_path: Path) -> None:
    backend = tokenizer_of()
    first = load_tokenizer(backend)
    backend.save_pretrained(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    assert again.name == "a"
    assert (again.fingerprint, again.template_fingerprint) == (first.fingerprint, first.template_fingerprint)
    assert again.vocab_size == first.vocab_size == len(backend)
    # not of how it was last called
    backend("the", truncation=True, max_length=8)
    assert load_tokenizer(backend).fingerprint == first.fingerprint
    others = [
        tokenizer_of(bos=True),
        tokenizer_of(words="zebras " * 9),
        tokenizer_of(eos_token="<|turn|>"),
        tokenizer_of(extra_special_tokens=["<|more|>"]),
    ]
    found = {load_tokenizer(other).fingerprint for other in others}
    found.add(load_tokenizer(backend, append_eos=False).fingerprint)
    assert len(found | {first.fingerprint}) == 6
    assert load_tokenizer(backend, append_eos=False).identity == first.identity
    assert load_tokenizer(tokenizer_of(template="{{ 1 }}")).identity == first.identity


def test_a_slow_tokenizer_has_one_too(tmp_path: Path) -> None:
    from fastkd.models.hub import load_transformers

    transformers = load_transformers()

    def slow(words: list[str]) -> Tokenizer:
        path = tmp_path / "vocab.json"
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        path.write_text(json.dumps({word: n for n, word in enumerate(words)}))
        return load_tokenizer(
            transformers.CTRLTokenizer(str(path), str(tmp_path / "merges.txt"), unk_token="<unk>", eos_token="a</w>")
        )

    words = ["<unk>", "a</w>", "b"]
    first = slow(words)
    assert first.encode("b b") == [2, 2, 1]
    assert slow(words).fingerprint == first.fingerprint != slow([*words, "c"]).fingerprint


def test_a_template_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    backend = tokenizer_of()
    mine = load_tokenizer(backend, template=path)
    assert mine.template(CHAT[:2], False) == "[the fox?][over the dog]"
    assert mine.template_fingerprint != load_tokenizer(backend).template_fingerprint
    path.write_text(TEMPLATE)
    assert load_tokenizer(backend, template=path).template_fingerprint == load_tokenizer(backend).template_fingerprint
    with pytest.raises(DataError, match=r"template nowhere: cannot be read"):
        _ = load_tokenizer(backend, template="nowhere").template_text


def test_no_template_is_an_error() -> None:
    tokenizer = load_tokenizer(tokenizer_of(template=None))
    with pytest.raises(DataError, match=r"it has no default chat template.*Give one in a file"):
        load_documents([CHAT], tokenizer=tokenizer, vocab_size=300)
    assert len(load_documents(["the fox"], tokenizer=tokenizer, vocab_size=300)) == 1


def test_a_template_that_asks_for_the_date_gets_the_same_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = "{% if strftime_now is defined %}{{ strftime_now(\"%d %b %Y\") }}, {{ strftime_now( '%B' ) }}{% endif %}"
    tokenizer = load_tokenizer(tokenizer_of(template=asks))
    assert datetime.now().year > 2024
    assert tokenizer.template(CHAT, False) == "26 Jul 2024, July"
    hidden = load_tokenizer(tokenizer_of(template="{% set f = '%d' %}{{ strftime_now(f) }}"))
    with pytest.raises(DataError, match="tomorrow"):
        _ = hidden.template_fingerprint


# Where it lies


def test_beside_the_teacher(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    tokenizer_of().save_pretrained(folder)
    own = load_hf(folder).tokenizer(append_eos=False)
    assert own.encode("the fox") == load_tokenizer(tokenizer_of(), append_eos=False).encode("the fox")


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "bert"])
def test_a_folder_without_one(tmp_path: Path, name: str) -> None:
    """Of some, transformers makes a tokenizer of no words, to which every text is empty."""
    with pytest.raises(TeacherError, match="--tokenizer") as error:
        load_tokenizer(saved(tmp_path, name))
    assert "\n" not in str(error.value)


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(TeacherError, match="got int; expected a name or a transformers tokenizer"):
        load_tokenizer(3)
    with pytest.raises(TeacherError, match="there is no such file"):
        load_tokenizer("/no/such/place")


def test_another_than_the_teachers() -> None:
    own, named = load_tokenizer(tokenizer_of()), load_tokenizer(tokenizer_of(words="zebras " * 9))
    same = load_tokenizer(tokenizer_of(), append_eos=False)
    assert choose_tokenizer(None, own) is own
    assert choose_tokenizer(named, None) is named
    assert choose_tokenizer(same, own) is same
    assert choose_tokenizer(None, None) is None
    with pytest.raises(DataError, match=f"{named.identity[:12]}.*{own.identity[:12]}"):
        choose_tokenizer(named, own)
    assert choose_tokenizer(named, own, allow_other_tokenizer=True) is named


# Documents


IDS = [[5, 6, 7], [], [8]]
TEXTS = ["", "the quick fox", "dogs"]
CHATS = [[], CHAT, CHAT[:2]]


def jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    return path


@pytest.mark.parametrize("holder", ["list", "arrow", "jsonl"])
@pytest.mark.parametrize(("values", "kind"), [(IDS, "ids"), (TEXTS, "text"), (CHATS, "messages")])
def test_a_column_is_read_as_what_it_holds(tmp_path: Path, holder: str, values: list[Any], kind: str) -> None:
    held: dict[str, Any] = {"list": values, "arrow": pa.array(values), "jsonl": jsonl(tmp_path / "a.jsonl", values)}
    assert detect_kind(open_source(held[holder], None).columns) == kind
    tokenizer = load_tokenizer(tokenizer_of(bos=True))
    found = load_documents(held[holder], tokenizer=tokenizer, vocab_size=300).read(range(len(values)))
    if kind == "ids":
        expected = values
    elif kind == "text":
        expected = [tokenizer.encode(text) for text in values]
    else:
        expected = [tokenizer.encode_chat(tokenizer.template(chat, False)) if chat else [] for chat in values]
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    assert found.tokens.tolist() == [i for ids in expected for i in ids]


def test_other_kinds_of_arrow() -> None:
    for values, kind in (
        (np.arange(6).reshape(2, 3), "ids"),
        (pa.array([[1], [2]], pa.large_list(pa.uint16())), "ids"),
        (pa.array([[1], [2]], pa.list_(pa.int32(), 1)), "ids"),
        (pa.array(["a", "b"], pa.large_string()), "text"),
        (pa.array(["a", "b"]).dictionary_encode(), "text"),
        ([], None),
        ([[], []], None),
        ([None], None),
    ):
        assert detect_kind(open_source(values, None).columns) == kind, values


def test_the_assistants_turns_count() -> None:
    backend = tokenizer_of()
    documents = load_documents([CHAT], tokenizer=load_tokenizer(backend), loss_on="assistant", vocab_size=300)
    found = documents[0]
    # a position counts if the next token is the assistant's
    said = text_of(backend, found.tokens[1:][found.loss_mask[:-1]])
    assert said == "over the dog<|end|>\nthe other<|end|>\n"
    assert load_documents([CHAT], tokenizer=load_tokenizer(backend), vocab_size=300)[0].loss_mask.all()


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_of())
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    for source, options, message in (
        (path, {"tokenizer": None}, r"a\.jsonl, line 1: got text without a tokenizer"),
        (CHATS, {"tokenizer": None}, "got messages without a tokenizer"),
        (path, {"vocab_size": 289}, r"got ids up to 289; expected up to 288.*Is this the teacher's tokenizer\?"),
        (path, {"loss_on": "assistant"}, 'loss_on: got "assistant", but .*a.jsonl, line 1 has text'),
        (IDS, {"loss_on": "assistant"}, "has ids; expected messages, or prompts with completions"),
    ):
        with pytest.raises(DataError, match=message):
            load_documents(source, **({"tokenizer": tokenizer, "vocab_size": 290} | options))  # type: ignore[arg-type]
    # ids need no tokenizer, and none is compared with them
    assert load_documents(IDS, tokenizer=tokenizer, vocab_size=9)[0].tokens.tolist() == [5, 6, 7]
    with pytest.raises(DataError, match="got id 8"):
        load_documents(IDS, vocab_size=8).read(range(3))


def test_fingerprints_reach_the_documents(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", CHATS)
    backend = tokenizer_of()

    def fingerprint(source: Any = path, loss_on: str = "all", **options: Any) -> str:
        tokenizer = load_tokenizer(options.pop("backend", backend), **options)
        return load_documents(source, tokenizer=tokenizer, loss_on=loss_on, vocab_size=300).fingerprint()

    template = tmp_path / "other.jinja"
    template.write_text(TEMPLATE.replace("\n", " "))
    first = fingerprint()
    assert fingerprint() == first
    # of a conversation, the end of a plain document says nothing
    assert fingerprint(append_eos=False) == first
    others = {
        fingerprint(loss_on="assistant"),
        fingerprint(template=template),
        fingerprint(backend=tokenizer_of(words="zebras " * 9)),
    }
    assert len(others | {first}) == 4
    texts = jsonl(tmp_path / "b.jsonl", [WORDS])
    assert fingerprint(texts) != fingerprint(texts, append_eos=False)


@pytest.mark.parametrize("on_a_thread", [False, True])
def test_a_template_that_does_not_end_is_an_error(
    on_a_thread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkd.models.tokenizers.TEMPLATE_SECONDS", 0.3)
    loops = "".join(f"{{% for a{i} in range(99999) %}}" for i in range(9)) + "{% endfor %}" * 9
    (tmp_path / "endless.jinja").write_text(loops + "{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(tokenizer_of(), template=tmp_path / "endless.jinja")
    documents = load_documents([CHAT] * 3, tokenizer=tokenizer, vocab_size=300)

    def read() -> None:
        with pytest.raises(DataError, match=r"document 0 .*the chat template took longer than 0\.3 s"):
            documents.read([0])

    if on_a_thread:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(read).result(timeout=60)
    else:
        read()


def test_many_templates_are_within_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.models.tokenizers.TEMPLATE_SECONDS", 0.05)
    tokenizer = load_tokenizer(tokenizer_of())
    tokenizer.template(CHAT, False)
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        tokenizer.template(CHAT[:1], True)


def test_a_template_is_read_from_a_file_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jinja")
    tokenizer = load_tokenizer(tokenizer_of(), template=tmp_path / "pipe.jinja")
    with pytest.raises(DataError, match=r"pipe\.jinja: cannot be read"):
        tokenizer.template(CHAT, False)
