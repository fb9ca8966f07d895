"""The table of measures, and that those who print them print what it says."""

from pathlib import Path

import pytest
import torch
from cases import sparse
from train_cases import Tiny, make_cache

from fastkd.evaluate.api import evaluate
from fastkd.evaluate.measures import DEMO, LOG, MEASURES, REPORT, explained, printed_in, sign_of
from fastkd.evaluate.rows import student_rows, teacher_rows


def test_every_measure_is_in_the_table() -> None:
    teacher = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    targets, labels = sparse(teacher, 6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    rows = student_rows(teacher, targets, labels), teacher_rows(targets, labels)
    assert {name for some in rows for name in some} - {"confidence"} <= MEASURES.keys()
    assert rows[1].keys() - {"confidence", "accuracy"} == {measure.name for measure in printed_in(REPORT, teacher=True)}


def test_the_log_has_what_the_table_says(tmp_path: Path) -> None:
    model = Tiny(logits=True)
    found = evaluate(lambda b: model(b.input_ids).flatten(0, 1)[b.targets.index], make_cache(tmp_path / "cache"))
    assert set(found.summary()) == {measure.name for measure in printed_in(LOG)}


@pytest.mark.parametrize(
    ("name", "sign"), [("cross_entropy", 1), ("accuracy", -1), ("agreement", -1), ("ece", 1), ("someone's own", 1)]
)
def test_which_way_is_better(name: str, sign: int) -> None:
    assert sign_of(name) == sign


def test_the_table_of_the_demo() -> None:
    assert [measure.name for measure in printed_in(DEMO)] == ["cross_entropy", "kl_bucket", "agreement"]
    for measure in MEASURES.values():
        assert measure.name == measure.name.lower()
        assert measure.about.endswith(".")
        assert measure.scale == (100 if measure.unit == "%" else 1)


def test_abbreviations_are_explained_where_they_are_printed() -> None:
    text = "\n".join(explained(["cross_entropy", "kl_bucket", "kl_sampled", "ece"]))
    assert text.startswith("kl_bucket: KL(teacher ‖ student) at T = 1")
    assert "\nkl_sampled: The same KL" in text
    assert "\nece: Expected calibration error" in text
    assert max(map(len, text.splitlines())) <= 80
    assert explained(["cross_entropy", "accuracy"]) == []


def test_the_glossary_has_every_measure() -> None:
    glossary = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
    for measure in MEASURES.values():
        assert f"| `{measure.name}` | {measure.label} | {measure.unit} |" in glossary
        assert measure.about in glossary
