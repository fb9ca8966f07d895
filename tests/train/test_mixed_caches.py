"""A cache of text and one of conversations, of one teacher and tokenizer, mixed: the loader, a training, its report."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hf_cases import tokenizer_of
from train_cases import SMALL, Tiny

import fastkd
from fastkd.cache import CacheError, open_cache
from fastkd.cli.main import main
from fastkd.errors import StreamError
from fastkd.report.peers import students_of
from fastkd.report.runs import read_run
from fastkd.stream.split import open_sources

pytest.importorskip("transformers")
TEXTS = [f"the quick brown fox {n} jumps over the lazy dog" for n in range(30)]
CHATS = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(20)]
HOW: dict[str, Any] = {"k": 6, "draws": 3, "context": 64, "shard_positions": 256, "held_out": 0.2}


def capture(out: Path, values: list[Any], column: str, **changes: Any) -> Path:
    data = out.with_suffix(".jsonl")
    data.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    given = {**HOW, "tokenizer": tokenizer_of(), "fingerprint": "one", **changes}
    assert fastkd.capture(Tiny(seed=7, logits=True, vocab=300), str(data), out, **given).complete
    return out


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("mixed")
    return [
        capture(place / "text", TEXTS, "text"),
        capture(place / "chat", CHATS, "messages", loss_on="assistant"),
    ]


def test_an_epoch_has_each_sequence_once(caches: list[Path]) -> None:
    specs = [open_cache(cache).spec for cache in caches]
    assert specs[0].tokenizer != specs[1].tokenizer
    loader = fastkd.DistillLoader(caches, batch_size=4)
    assert sum(step.sequences for step in loader) == sum(
        step.sequences for cache in caches for step in fastkd.DistillLoader(cache, batch_size=4)
    )
    opened, weights = open_sources(caches)
    own = [sum(step.positions for step in fastkd.DistillLoader(cache, batch_size=4)) for cache in caches]
    assert [Fraction(n) for n in own] == weights
    assert [weight for _, weight in zip(*open_sources([(opened[0], 3), (opened[1], 1)]), strict=True)] == [3, 1]


def test_another_tokenizer_is_refused(caches: list[Path], tmp_path: Path) -> None:
    other = capture(tmp_path / "other", TEXTS, "text", tokenizer=tokenizer_of(words="other words than those " * 20))
    with pytest.raises(StreamError, match=r"cannot be mixed: tokenizer is '[0-9a-f]{64}' in one and '[0-9a-f]{64}'"):
        fastkd.DistillLoader([caches[0], other], batch_size=4)


def test_the_mean_of_caches_that_count_other_positions_is_refused(caches: list[Path], tmp_path: Path) -> None:
    """Before anything is written."""
    every = capture(tmp_path / "all", CHATS, "messages", loss_on="all")
    with pytest.raises(CacheError, match=r"they have other (data|loss_on)"):
        fastkd.mix_targets([caches[1], every], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_training_by_command(caches: list[Path], tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    given = ["--student", "train_cases:wide", "--out", str(run), "--steps", "2", "--batch-tokens", "200", "--device"]
    both = [word for cache in caches for word in ("--cache", str(cache))]
    assert main(["train", *given, "cpu", *both, "--cache-weights", "1"]) == 1
    assert "--cache-weights: got 1 for 2 caches; expected one for each" in capfd.readouterr().err
    assert main(["train", *given, "cpu", *both, "--evaluate-every", "1", "--control"]) == 0
    printed = capfd.readouterr()
    assert "evaluations: 2, after every step, on 10 held-out documents" in printed.err
    assert "±" in printed.out
    document = json.loads((run / "run.json").read_text())
    text, chat = document["caches"]
    assert (text["place"], chat["place"]) == tuple(map(str, caches))
    assert text["share"] + chat["share"] == pytest.approx(1)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "was trained on a mixture" in page
    assert "(text); " in page
    assert "(conversations, loss on assistant). " in page
    judged = document["report"]["verdicts"]["control"]
    assert judged["measure"] == "cross_entropy"
    assert f"{judged['windows']} held-out windows" in page, "the verdict is that of the command"
    assert len(read_run(run, "run").mixture) == 2


def test_students_that_learn_from_each_other(caches: list[Path], tmp_path: Path) -> None:
    """Each, and their ensemble, has an evaluation for each cache, which the page reads."""
    (tmp_path / "evaluation-wide.json").write_text("[]")  # of a version that wrote lists there, and ended with an error
    changes = {**SMALL, "steps": 1, "evaluate_every": 1}
    assert fastkd.mutual(["train_cases:wide", "train_cases:wide"], caches, tmp_path / "run", **changes).complete
    (tmp_path / "evaluation-wide.json").rename(tmp_path / "run" / "evaluation-wide.json")
    assert fastkd.mutual(["train_cases:wide", "train_cases:wide"], caches, tmp_path / "run", **changes).complete
    assert main(["report", str(tmp_path / "run")]) == 0
    students = students_of(read_run(tmp_path / "run", "run"), tmp_path / "run")
    assert [len(one.evaluations) for one in students] == [2, 2, 2]


def test_weights_in_python(caches: list[Path], tmp_path: Path) -> None:
    report = fastkd.train("train_cases:wide", [(caches[0], 3), (caches[1], 1)], tmp_path, **{**SMALL, "steps": 1})
    assert report.complete
    assert [part["share"] for part in json.loads((tmp_path / "run.json").read_text())["caches"]] == [0.75, 0.25]
