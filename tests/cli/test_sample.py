"""`fastkd inspect --sample`: the positions that it shows, and how."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vision_cases
from hf_cases import WORDS, tokenizer_of

import fastkd
from fastkd.cache import open_cache
from fastkd.cli.main import main
from fastkd.cli.sample import sample_text
from fastkd.models.tokenizers import load_tokenizer
from fastkd.utils.text import report_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train_cases import Tiny

    place = tmp_path_factory.mktemp("sample")
    tokenizer_of().save_pretrained(place / "tokenizer")
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    documents = [tokenizer.encode(WORDS[i : i + 60]) for i in range(0, 60, 3)]
    fastkd.capture(Tiny(seed=1, vocab=300), documents, place / "cache", k=4, context=32, shard_positions=64)
    return place


def said(capsys: Any, *args: object) -> str:
    assert main([str(arg) for arg in ("inspect", *args)]) == 0
    out: str = capsys.readouterr().out
    return out


def test_positions_from_all_over_the_cache(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = open_cache(place / "cache")
    text = said(capsys, place / "cache", "--sample", "3", "--tokenizer", place / "tokenizer")
    assert all(len(line) <= 80 for line in text[text.index("Sample:") :].splitlines())
    assert "others 0." in text
    found = json.loads(said(capsys, place / "cache", "--sample", "3", "--tokenizer", place / "tokenizer", "--json"))
    sequences = int(cache.manifest.column("sequences").to_numpy().sum())
    assert [one["sequence"] for one in found["sample"]] == [0, round((sequences - 1) / 2), sequences - 1]
    tokenizer = tokenizer_of()
    for one in found["sample"]:
        arrays, i = cache.sequences([one["sequence"]]), one["position"]
        assert f"sequence {one['sequence']:,}, position {i:,}" in text
        assert "".join(one["before"]) == tokenizer.decode(arrays["tokens"][max(0, i - 23) : i + 1])
        assert one["top"][0] == [
            tokenizer.decode([arrays["ids"][i, 0]]), pytest.approx(float(np.exp(arrays["logprobs"][i, 0])))
        ]  # fmt: skip
        assert f"{one['top'][0][1]:.3f}" in text
    ids = json.loads(said(capsys, place / "cache", "--sample", "1000", "--json"))["sample"]
    assert len(ids) == sequences
    assert all(isinstance(token, int) for one in ids for token, _ in one["top"])
    assert "sample" not in json.loads(said(capsys, place / "cache", "--json"))


def test_a_line_is_not_broken_inside_a_token() -> None:
    top = [(f" token {number}", 0.0) for number in range(8)]
    text = sample_text([{"sequence": 0, "position": 1, "before": ["a"], "next": " to ken", "top": top, "tail": 1.001}])
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(any(f"' token {number}' 0.000" in line for line in text.splitlines()) for number in range(8))
    assert "    next ' to ken'; ' token 0' 0.000, " in text
    assert text.endswith("others 1.000"), "no probability is above 1"


def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vision_cases.make_cache(tmp_path / "cache")
    found = json.loads(said(capsys, tmp_path / "cache", "--sample", "2", "--json"))["sample"]
    assert all({"example", "augmentation_seed", "top", "tail"} <= one.keys() for one in found)
    assert "before" not in found[0]
    assert "others" in said(capsys, tmp_path / "cache", "--sample", "2")


def test_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    vision_cases.make_cache(cache)
    classes = open_cache(cache).spec.vocab_size
    names = [f"class {chr(97 + number % 26)}{number}" for number in range(classes)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    plain = said(capsys, cache, "--sample", "2")
    assert "numbers of classes: --classes FILE" in plain
    assert "the teacher's most likely classes" in plain
    assert "  example " in plain
    assert "sequence" not in plain[plain.index("Sample:") :]
    numbers = json.loads(said(capsys, cache, "--sample", "2", "--json"))["sample"]
    found = json.loads(said(capsys, cache, "--sample", "2", "--classes", tmp_path / "names.txt", "--json"))["sample"]
    for one, other in zip(found, numbers, strict=True):
        assert [name for name, _ in one["top"]] == [names[number] for number, _ in other["top"]]
    text = said(capsys, cache, "--sample", "2", "--classes", tmp_path / "names.txt")
    assert f"'{found[0]['top'][0][0]}' " in text
    assert "--classes FILE" not in text
    (tmp_path / "empty").write_text("")
    (tmp_path / "many").write_text("\n".join([*names, "one"]))
    more = f"many with {classes + 1} names; expected {classes}, one a class."
    for name, says in (("none", "cannot be read"), ("empty", "which has no names"), ("many", more)):
        assert main(["inspect", str(cache), "--sample", "1", "--classes", str(tmp_path / name)]) == 1
        assert says in capsys.readouterr().err
    (tmp_path / "few").write_text("\ufeffone", encoding="utf-8")
    assert main(["inspect", str(cache), "--sample", "2", "--classes", str(tmp_path / "few")]) == 0
    assert f"few: 1 name for {classes} classes; the others are shown by their numbers." in capsys.readouterr().err
    assert main(["inspect", str(cache), "--sample", "2", "--tokenizer", "any"]) == 1
    assert "--tokenizer: got 'any' for a cache of examples; expected --classes." in capsys.readouterr().err


def test_names_come_before_hashes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, place / "cache", "--sample", "1")
    assert "ids of tokens: --tokenizer NAME shows their text" in text
    assert re.search(r"[0-9a-f]{13}", text) is None
    (teacher,) = [line for line in text.splitlines() if line.startswith("  teacher ")]
    assert teacher.split()[1].startswith("Tiny")
    report = json.loads(said(capsys, place / "cache", "--json"))
    assert re.search(r"\b[0-9a-f]{64}\b", report["teacher"])  # whole for programs
    report |= {"notes": "teacher me/small", "teacher": f"Llama, sha256 {'ab' * 32}, float32"}
    assert "teacher me/small: Llama, float32, sha256 abababababab tok" in " ".join(report_text(report).split())
    assert "  notes" not in report_text(report)


def test_what_cannot_be(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "cache"), "--tokenizer", "x"]) == 1
    assert "--tokenizer: got 'x' without --sample; expected both" in capsys.readouterr().err
    assert main(["inspect", str(place / "cache"), "--sample", "-1"]) == 1
    assert "--sample -1: expected a number of positions" in capsys.readouterr().err
    assert main(["inspect", str(place / "cache"), "--sample", "1", "--classes", "names"]) == 1
    assert "--classes: got 'names' for a cache of text; expected --tokenizer." in capsys.readouterr().err
    assert main(["inspect", str(place / "cache"), "--sample", "1", "--tokenizer", str(tmp_path / "none")]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err
