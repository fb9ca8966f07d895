"""The words for a kind of data, and where they are said: a cache of examples is never told of as text."""

import re
from pathlib import Path

import numpy as np
import pytest
from vision_cases import SMALL, Net, examples, make_cache

import fastkd
from fastkd.cache import open_cache
from fastkd.cache.inspect import inspect_cache
from fastkd.capture.check import check_teacher, check_text
from fastkd.capture.estimate import estimate, estimate_text
from fastkd.capture.runner import capture_text
from fastkd.capture.window_plan import plan_text
from fastkd.cli.sample import sample_text, sampled
from fastkd.evaluate.measures import MEASURES, about, distinct
from fastkd.evaluate.result import Evaluation
from fastkd.report.make import page_of
from fastkd.report.render import to_html
from fastkd.report.runs import read_runs
from fastkd.settings import CaptureSettings
from fastkd.sweep.result import sweep_text
from fastkd.teachers.load import as_teacher
from fastkd.train.result import report_of
from fastkd.utils.text import report_text
from fastkd.utils.words import EXAMPLES, TEXT, counted, words_of

OF_TEXT = re.compile(r"(?<!-)\b(tokens?|documents?|windows?|vocabulary|positions?)\b", re.IGNORECASE)
TOTALS = {"documents": 60, "skipped": 0, "held_out": 12, "long": 0, "nothing_to_predict": 0, "shards": 1}


def test_counts() -> None:
    assert TEXT.counted(35_563, 1) == "35,563 positions in 1 window"
    assert EXAMPLES.counted(60, 60) == "60 examples"
    assert EXAMPLES.counted(120, 60, before="held-out") == "120 held-out copies of 60 examples"
    assert (counted(1, "shard"), TEXT.outcomes, EXAMPLES.outcomes) == ("1 shard", "tokens", "classes")
    assert words_of(("example", "augmentation_seed")) is EXAMPLES
    assert words_of(("tokens", "loss_mask")) is TEXT
    twice = "plan: 60 examples (12 held out) in 2 augmented copies each, 1 shard"
    assert plan_text(TOTALS, 2, "split", EXAMPLES) == twice
    assert plan_text(TOTALS, 1, "split", EXAMPLES) == "plan: 60 examples (12 held out), 1 shard"


def test_measures_of_classes() -> None:
    for measure in MEASURES.values():
        assert not OF_TEXT.search(about(measure, EXAMPLES)), measure
    assert about(MEASURES["kl_bucket"], EXAMPLES, exact=True).endswith(
        "exact: the teacher's targets hold every outcome."
    )
    assert "bound" in about(MEASURES["kl_bucket"])


def test_two_equal_divergences_are_one() -> None:
    equal, other = {"kl_bucket": 0.5, "kl_sampled": 0.5 + 1e-9, "ece": 0.1}, {"kl_bucket": 0.5, "kl_sampled": 0.6}
    assert distinct([equal, equal]) == ["kl_bucket", "ece"]
    assert distinct([equal, other]) == ["kl_bucket", "kl_sampled", "ece"]
    assert distinct([{"kl_sampled": 0.5}, {}]) == ["kl_sampled"]
    assert distinct([]) == []


@pytest.fixture(scope="module", params=[False, True], ids=["images", "copies"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool, list[str]]:
    """A folder with a cache whose targets hold all classes, a run with its control and a sweep; and what they said."""
    folder, copies = tmp_path_factory.mktemp("words"), bool(request.param)
    data = examples() if copies else examples(augment=None, fingerprint="", copies=1)
    said: list[str] = []

    def hear(event: dict[str, object]) -> None:
        said.append(str(event.get("text", "")))

    teacher = Net(seed=7)
    settings = CaptureSettings(k=48, held_out=0.2, shard_positions=32)
    said.append(estimate_text(estimate(as_teacher(teacher, data), data, settings, seconds=0.0)))
    report = fastkd.capture(teacher, data, folder / "cache", settings, progress=hear)
    said.append(capture_text(report))
    cache = open_cache(folder / "cache")
    said += [report_text(inspect_cache(cache)), sample_text(sampled(cache, 3))]
    said.append(check_text(check_teacher(cache, as_teacher(teacher, data), data=data)))
    options = SMALL | {"steps": 4, "evaluate_every": 2}
    done = fastkd.train(Net, cache, folder / "run", data=data, control=not copies, progress=hear, **options)
    said.append(report_of(done))
    if not copies:
        said.append(sweep_text(fastkd.sweep(Net, cache, folder / "sweep", {"alpha": [0.0, 1.0]}, data=data, **options)))
    return folder, copies, said


def test_nothing_is_said_of_text(trained: tuple[Path, bool, list[str]]) -> None:
    _, copies, said = trained
    whole = "\n".join(said)
    assert [line for line in whole.split("\n") if OF_TEXT.search(line)] == []
    assert "≥" not in whole
    assert "kl_sampled" not in whole
    assert "kl_bucket" in whole
    assert ("120 copies of 60 examples" in whole) == copies
    assert ("paired over 12 held-out examples" in whole) != copies
    assert ("± inf between seeds" in whole or "between examples" in whole) != copies


def test_a_report_of_examples(trained: tuple[Path, bool, list[str]]) -> None:
    folder, _, _ = trained
    html = to_html(page_of(read_runs([folder / "run"])))
    text = re.sub(r"<(style|script|svg)\b.*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)
    assert [found[0] for found in OF_TEXT.finditer(text)] == []
    assert "≥" not in text
    assert "sampled" not in text
    assert "all is exact" in text


def test_metrics_and_files_are_as_they_were(trained: tuple[Path, bool, list[str]]) -> None:
    """What is told once is still measured and written twice: runs of older versions are compared with."""
    folder, _, _ = trained
    run = read_runs([folder / "run"])[0]
    assert run.evaluation is not None
    assert {"kl_bucket", "kl_sampled"} <= run.evaluation.student.sums.keys()
    assert run.evaluation.exact
    assert np.array_equal(run.evaluation.student.sums["kl_bucket"], run.evaluation.student.sums["kl_sampled"])
    older = run.evaluation.to_json()
    del older["kind"]
    assert Evaluation.from_json(older).words is TEXT


def test_targets_without_some_classes_are_no_bounds_of_nothing(tmp_path: Path) -> None:
    """With a tail, the KL is a bound and the two differ: both are told."""
    cache = make_cache(tmp_path / "cache")
    found = fastkd.train(Net, cache, tmp_path / "run", data=examples(), **SMALL | {"steps": 4, "evaluate_every": 4})
    assert "kl_sampled" in report_of(found)
    html = to_html(page_of(read_runs([tmp_path / "run"])))
    assert "≥" in html
    assert "all is exact" not in html
