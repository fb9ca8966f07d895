"""The report: what is on the page, that text stays text, and which files it refuses."""

import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import make_shard, make_spec
from report_cases import CONTROL, STUDENT, evaluation, write_run
from train_cases import Tiny, documents

import fastkd
from fastkd.cache import CacheError, create_cache
from fastkd.cli import main as cli
from fastkd.demo.completions import completions_section
from fastkd.demo.page import break_even, cost_section
from fastkd.errors import NoRun, ReportError
from fastkd.evaluate.api import compare
from fastkd.evaluate.slices import SAYS, SLICES
from fastkd.report import plots, render, sections
from fastkd.report.make import make_report, page_of
from fastkd.report.measures import MEASURES, cell, perplexity, verdict
from fastkd.report.page import (
    Answer,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Code,
    Column,
    Example,
    Line,
    Notes,
    Page,
    Paragraph,
    Row,
    Section,
    Series,
    Table,
)  # fmt: skip
from fastkd.report.render import to_html
from fastkd.report.runs import Comparison, in_lines, measured, read_run, read_runs
from fastkd.report.sections import register_section
from fastkd.train import evaluations as kept
from fastkd.train.verdict import judge
from fastkd.utils.intervals import Interval
from fastkd.utils.numbers import (
    decimals,
    difference_text,
    figures,
    measure_text,
    percent,
    prefixed,
    seconds,
    with_half,
)

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> &amp; $x^2$ \x1b[31m\u202e"
VOID = {"meta", "br", "img"}
KL, AGREEMENT, ENTROPY = (MEASURES[name] for name in ("kl_bucket", "agreement", "cross_entropy"))


class Reader(HTMLParser):
    """The page as a browser reads it: tags, attributes, words; every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u202f", " ").split())


def asks_nothing(text: str) -> None:
    """No address, no script, nothing to be loaded: every reference is to a part of the page itself."""
    page = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
            assert value.startswith("#")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\((.*?)\)", text))
    assert "default-src 'none'" in text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "healed")


def page(*folders: Path) -> Reader:
    text = to_html(page_of(read_runs(folders), command="fastkd report healed"))
    asks_nothing(text)
    return Reader(text)


def written(*folders: Path) -> str:
    """The text of the page that the command writes."""
    found = make_report(folders)
    return Reader(Path(found["report"]).read_text(encoding="utf-8")).text


WORSE = (3.2, *CONTROL[1:])

# What is on it


def test_a_run_beside_its_control(run: Path) -> None:
    found = page(run).text
    ours, theirs = evaluation(STUDENT), evaluation(CONTROL, seed=1)
    for one in (ours, theirs):
        for measure in MEASURES.values():
            mean, half = with_half(*one.intervals()[measure.name], scale=measure.scale)
            assert f"{mean} ± {half}".replace("\u202f", " ") in found, measure.name
    for key, value in compare(ours, theirs).items():
        measure = MEASURES[key]
        mean, half = with_half(*value, scale=measure.scale, sign=True)
        assert f"{mean} ± {half}" in found, key
    known = ours.teacher_intervals()["label_known"].mean
    for words in (
        "Distillation: healed", "healed, control", "113 M", "453 MB", "135 M", "6132 positions in 12 windows",
        "a lower bound", "an estimate", "lower is better", "higher is better", "0.25 %", "2 min 51 s", "1.43 k",
        "against its control", "better", "teacher, at least", "x86_64, 2 threads", f"{100 * known:.1f} % of the labels",
        "Guo et al. 2017", "95% intervals", "--student SmolLM2-135M", "fastkd report healed",
    ):  # fmt: skip
        assert words in found, words
    # α is what differs, and stands apart from what does not
    assert "settings that all runs have in common" in found
    assert re.search(r"setting healed healed, control alpha 0\.5 1 Only what differs", found)
    # the seven curves of the training and the held-out data, the rate, the gradient, and calibration
    for title in ("Training loss", "Soft loss", "Hard loss", "Held out: KL from teacher", "Held out: top-1 agreement",
                  "Held out: cross-entropy", "Learning rate", "Gradient norm", "Calibration"):  # fmt: skip
        assert title in found
    # T was constant: no curve of it
    assert sum(1 for tag in page(run).tags if tag == "figure") == 12


@pytest.mark.usefixtures("undrawn")
def test_worse_is_said(tmp_path: Path) -> None:
    found = page(write_run(tmp_path / "bad", CONTROL, control=STUDENT)).text
    assert "worse: +0.11" in found
    assert "better: " not in found


@pytest.mark.usefixtures("undrawn")
def test_a_missing_control(tmp_path: Path) -> None:
    found = page(write_run(tmp_path / "alone", control=None)).text
    assert "control" not in found
    assert "All 16 settings" in found


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("ours", "theirs", "says", "mark"),
    [
        (STUDENT, WORSE, "helped", "▲ helped"),
        (WORSE, STUDENT, "hurt", "▼ hurt"),
        (STUDENT, (3.0162, *STUDENT[1:]), "no difference", "= no difference"),
    ],
)  # fmt: skip
def test_whether_features_helped(
    ours: tuple[float, ...], theirs: tuple[float, ...], says: str, mark: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "matched", ours, control=None, without=theirs, match=["20:16:mse:0.1"])
    found = page(run).text
    mean, half = compare(evaluation(ours), evaluation(theirs, seed=2))["cross_entropy"]
    figure = f"cross_entropy {mean:+.4f} ± {half:.4f}, paired over 12 held-out windows; one seed"
    assert "Did the features help?" in found
    assert f"matched against without features: {says} ({figure})" in found
    assert mark in found
    assert "Matched: 20:16:mse:0.1." in found
    assert "against the same without features" in found
    assert "matched, without features" in found
    (run / "without_features" / "evaluation.json").unlink()
    assert "matched: not known" in page(run).text
    shutil.rmtree(run / "without_features")
    assert "features help" not in page(run).text


@pytest.mark.usefixtures("undrawn")
def test_verdicts_by_slice(run: Path) -> None:
    found = page(run).text
    ours, theirs = evaluation(STUDENT), evaluation(CONTROL, seed=1)
    judged = judge("control", [ours], [theirs], [1.0], "cross_entropy")
    assert judged is not None
    assert judged.cells == len(SLICES) * 4  # cross-entropy, KL, agreement, accuracy
    assert "Did distillation help?" in found
    assert f"healed {judged.sentence()}." in found
    assert f"{judged.cells} cells" in found
    for name, says in SAYS.items():
        assert says in found
        for key, value in judged.slices[name].items():
            mean, half = with_half(*value, scale=MEASURES[key].scale, sign=True)
            assert f"{mean} ± {half}".replace("\u202f", " ") in found, (name, key)
    # signs as well as colours, and a shade for what differs alone
    text = to_html(page_of(read_runs([run])))
    marks = "▲ helped|▼ hurt|= no difference"
    cells = re.findall(rf'<td( style="--shade:\d+%")? class="[^>]*>((?:(?!</td>).)*?)({marks})', text, re.DOTALL)
    assert {mark for *_, mark in cells} == set(marks.split("|"))
    assert all((mark == "= no difference") == (style == "") for style, _, mark in cells)


def kept_at(run: Path, steps: Sequence[int], ours: tuple[float, ...], theirs: tuple[float, ...]) -> None:
    for step in steps:
        kept.write(run, step, [evaluation(ours)])
        kept.write(run / "control", step, [evaluation(theirs, seed=1)])


@pytest.mark.usefixtures("undrawn")
def test_the_difference_after_each_evaluation(run: Path) -> None:
    assert "Student minus control" not in page(run).text
    kept_at(run, (40, 80, 120), STUDENT, CONTROL)
    kept.write(run, 160, [evaluation(STUDENT)])  # the control was not evaluated there
    found = page_of(read_runs([run]))
    (both,) = (chart for chart in found.charts if chart.name.startswith("both-"))
    (difference,) = (chart for chart in found.charts if chart.name.startswith("difference-"))
    expected = compare(evaluation(STUDENT), evaluation(CONTROL, seed=1))["cross_entropy"]
    (line,) = difference.lines
    assert list(line.x) == [40, 80, 120]
    assert line.band is not None
    assert (line.y[0], line.band[0][0], line.band[1][0]) == (expected.mean, expected.low, expected.high)
    assert [one.series.dashed for one in both.lines] == [False, True]
    text = page(run).text
    assert "Student minus control: cross-entropy" in text
    path = run / "evaluations" / "step-00000040.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ReportError, match=r"step-00000040.npz: cannot be read"):
        read_runs([run])


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bad", WORSE, control=STUDENT)
    kept_at(run, (40, 80), (3.4, *CONTROL[1:]), STUDENT)
    document = json.loads((run / "run.json").read_text())
    worse = {"step": 80, "looks": 5, "against": "control", "measure": "cross_entropy"}
    document["report"] |= {"steps": 240, "stopped_worse": worse}
    (run / "run.json").write_text(json.dumps(document))
    found = page(run).text
    assert "bad was stopped after step 80 of 240: there it was worse than bad, control by cross_entropy" in found
    assert "beyond an interval of 95% for all 5 comparisons together" in found
    # compared after the same step
    mean, half = compare(evaluation((3.4, *CONTROL[1:])), evaluation(STUDENT, seed=1))["cross_entropy"]
    assert f"bad against control: hurt (cross_entropy {mean:+.4f} ± {half:.4f}, at step 80, paired" in found


@pytest.mark.usefixtures("undrawn")
def test_several_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a" / "run"),
        write_run(tmp_path / "b" / "run", (3.0, 0.6, 0.65, 0.61, 0.42, 0.02), rate=1e-4),
    ]
    found = page(*runs).text
    assert "2 runs compared" in found
    for words in ("a/run", "b/run", "b/run, control", "against a/run", "rate 0.0003 0.0003 0.0001 0.0001"):
        assert words in found
    with pytest.raises(ReportError, match="given twice"):
        read_runs([runs[0], runs[0]])


@pytest.mark.usefixtures("undrawn")
def test_runs_of_other_windows_are_not_subtracted(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation(content="other").to_json()))
    found = page(*runs).text
    assert "against a" not in found.replace("against its control", "")
    # each has its own teacher's row
    assert found.count("from its targets") == 2


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_a_mixture_of_caches(run: Path) -> None:
    other = (2.5, 0.5, 0.55, 0.7, 0.5, 0.01)
    for folder, values, second, seed in ((run, STUDENT, other, 0), (run / "control", CONTROL, (2.7, *other[1:]), 1)):
        found = [evaluation(values, seed=seed), evaluation(second, seed=seed, content="c1")]
        (folder / "evaluations.json").write_text(json.dumps([one.to_json() for one in found]))
        (folder / "evaluation.json").unlink()
        document = json.loads((folder / "run.json").read_text())
        document["caches"] = [{"place": "a", "share": 0.25}, {"place": "b", "share": 0.75}]
        (folder / "run.json").write_text(json.dumps(document))
    (ours,) = read_runs([run])
    each = [one.intervals()["cross_entropy"] for one in (evaluation(STUDENT), evaluation(other, content="c1"))]
    mean = 0.25 * each[0].mean + 0.75 * each[1].mean
    assert ours.measures["cross_entropy"].mean == pytest.approx(mean)
    half = math.hypot(0.25 * each[0].half, 0.75 * each[1].half)
    assert ours.measures["cross_entropy"].half == pytest.approx(half)
    text = page(run).text
    assert "healed against control: helped" in text
    assert "paired over 24 held-out windows" in text
    assert "against its control" in text
    (run / "evaluations.json").write_text("[3]")
    with pytest.raises(ReportError, match=r"evaluations\.json: "):
        read_runs([run])


@pytest.mark.usefixtures("undrawn")
def test_students_without_a_teacher(tmp_path: Path) -> None:
    models = {"a": Tiny(seed=1), "b": Tiny(seed=2)}
    more: Any = {"control": True, "steps": 2, "batch_tokens": 60, "context": 16, "held_out": 0.2, "device": "cpu"}
    assert fastkd.mutual(models, out=tmp_path / "mutual", data=documents(), **more).complete
    found = written(tmp_path / "mutual")
    assert found.count("against its control") == 2
    assert "cached outputs" not in found
    assert "from its targets" not in found
    assert "What its targets know" not in found
    # beside one that has a teacher, whichever comes first
    other = write_run(tmp_path / "other", control=None)
    for runs in ((tmp_path / "mutual", other), (other, tmp_path / "mutual")):
        found = written(*runs)
        assert found.count("from its targets") == 1
        assert "What its targets know" in found


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    found = page(folder).text
    for words in (
        "These runs have no evaluation",
        "nothing was logged",
        "These runs have no settings",
        "No command was recorded for bare",
    ):
        assert words in found
    # the last evaluation of the log serves where there is no other; a number alone has no interval
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "evaluation": {"kl_bucket": 0.5, "cross_entropy": {"mean": 2.5}}}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "run.json").write_text(
        json.dumps({"settings": {"a": None, "b": [1, True, {"c": 2.5}]}, "student": {"bytes": "many"}})
    )
    found = page(folder).text
    assert "0.500" in found
    assert "±" not in found.replace("±, ranges", "")
    assert "12.2" in found  # its perplexity


@pytest.mark.usefixtures("undrawn")
def test_windows_unknown_the_measures_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluated=False)
    found = page(run).text
    last = read_run(run, "r").points[-1].measures["kl_bucket"]
    assert " ± ".join(with_half(*last)) in found
    assert "against its control" not in found
    assert "control: 0.7" in found
    assert "Differences have no intervals here" in found
    assert "teacher, at least" not in found


@pytest.mark.usefixtures("undrawn")
def test_the_cache(tmp_path: Path) -> None:
    spec = make_spec(notes=f"see https://user:secret@host/x?signature=abc {EVIL}", draws=3)
    with create_cache(tmp_path / "cache", spec) as writer:
        writer.write_shard(0, **make_shard(spec, 64))
        writer.seal()
    run = write_run(tmp_path / "run", place=str(tmp_path / "cache"), spec=spec.hash)
    make_report([run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    found = Reader(text).text
    for words in (
        "Cache",
        "of the positions",
        "top-k entries k = 8",
        "draws 3 at T = 1",
        "mass of the top-k",
        "head/values",
        "other: the arrays' names",
    ):
        assert words in found
    assert "secret" not in text
    assert "signature" not in text
    assert "<script>" not in text
    # another cache there, none there
    write_run(tmp_path / "other", place=str(tmp_path / "cache"))
    make_report([tmp_path / "other"], tmp_path / "r.html")
    assert (
        "holds another cache than the one that other was trained from" in Reader((tmp_path / "r.html").read_text()).text
    )
    write_run(tmp_path / "gone", place=str(tmp_path / "nowhere"))
    make_report([tmp_path / "gone"], tmp_path / "r.html")
    assert "cannot be read" in (tmp_path / "r.html").read_text()


def test_no_address_that_a_run_names_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder may be a stranger's: its addresses learn nothing, unless --fetch asks them."""
    asked: list[str] = []

    def opens(place: str) -> Any:
        asked.append(place)
        raise CacheError("no answer")

    monkeypatch.setattr("fastkd.report.sections.cache.open_cache", opens)
    for place in ("https://host/cache", "s3://bucket/cache", "http+other://host", "\\\\host\\share://x"):
        run = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), place=place, control=None)
        assert "was not asked. --fetch asks it" in Reader(to_html(page_of(read_runs([run])))).text
        assert not asked
        assert "cannot be read: no answer" in Reader(to_html(page_of(read_runs([run]), fetch=True))).text
        assert asked.pop() == place
    assert cli.main(["report", str(run), "--fetch"]) == 0
    assert asked.pop() == place


# Sections of the demo


def test_completions_and_cost(run: Path) -> None:
    answers = {
        "teacher": {"prefixes": [EVIL], "tops": [[[" the", 0.71], ["\n", 0.0123]]], "written": [EVIL]},
        "control": {"prefixes": [EVIL], "tops": [[[EVIL, 2.0]]], "written": [""]},
    }
    more = [
        completions_section(answers),
        cost_section(capture=35, cached=86, live=95, note="As measured."),
    ]
    text = to_html(page_of(read_runs([run]), more=more))
    asks_nothing(text)
    found = Reader(text).text
    for words in ("␣the", "71 %", "1.2 %", "⏎", "4 students", "1 min 26 s", "1.1 times as long", "As measured."):
        assert words in found
    assert 'style="width:100.00%"' in text
    assert "break-even: 4 students" in found


def test_break_even() -> None:
    assert break_even(capture=35, cached=86, live=121) == 1
    assert break_even(capture=35, cached=86, live=120.9) == 2
    assert break_even(capture=350, cached=86, live=96) == 35
    assert break_even(capture=0.1, cached=1, live=100) == 1
    assert break_even(capture=1, cached=86, live=86) is None
    assert "never" in Reader(to_html(Page("t", "", [cost_section(capture=1, cached=2, live=1)]))).text


# Sections from outside


@pytest.mark.usefixtures("undrawn")
def test_a_section_from_outside_the_package(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_registered", [])

    def build(comparison: Comparison) -> Section | None:
        names = [student.name for student, _ in comparison.students]
        return Section("Names", [Code(", ".join(names))]) if len(names) > 1 else None

    register_section(build, position=25)
    found = page(run).text
    # below the curves and above the speed
    assert found.index("Training curves") < found.index("Names healed, healed, control") < found.index("Training speed")
    # a section with nothing to show is left out
    shutil.rmtree(run / "control")
    assert "Names" not in page(run).text


# Text stays text


@pytest.mark.usefixtures("undrawn")
def test_credentials_are_masked(tmp_path: Path) -> None:
    """Also those of a run that another program wrote."""
    url = "https://user:hunter2@host/x?signature=0123abcd"
    run = write_run(tmp_path / "run", notes=f"see {url}", control=None, log=url, nested={"url": [url]})
    document = json.loads((run / "run.json").read_text())
    document |= {"command": ["fastkd", "train", "--cache", url], "caches": [{"place": url}], "machine": {"gpu": url}}
    document["student"]["name"] = url
    (run / "run.json").write_text(json.dumps(document))
    text = to_html(page_of(read_runs([run]), title=url, command=f"fastkd report {url}"))
    assert text.count("host/x") > 6
    for secret in ("hunter2", "0123abcd"):
        assert secret not in text


def test_hostile_text_is_text(tmp_path: Path) -> None:
    """In every place that a file fills."""
    run = write_run(tmp_path / "evil <b>&'\"", notes=EVIL, **{EVIL: EVIL})
    for path in tmp_path.rglob("run.json"):
        document = json.loads(path.read_text())
        document |= {"command": ["fastkd", EVIL], "machine": {EVIL: EVIL, "gpu": EVIL}, "caches": [{"place": EVIL}]}
        document["student"]["name"] = EVIL
        path.write_text(json.dumps(document))
    data = evaluation().to_json() | {"device": EVIL}
    (run / "evaluation.json").write_text(json.dumps(data))
    text = to_html(page_of(read_runs([run]), title=EVIL, command=EVIL))
    asks_nothing(text)
    found = Reader(text)
    assert not {"b", "img"} & set(found.tags)
    assert "<script>alert('x')</script>" in found.text
    # neither escape sequences nor characters that turn the direction of what follows
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u202e" in found.text


def test_every_block_escapes() -> None:
    label = "<b>&$x^2$\u202e"  # what is longer leaves no room to draw in
    lines = [Line(Series(EVIL, 0), [0, 1], [1, 2])]
    chart = Chart("x", EVIL, EVIL, label, label, lines, (1.0, label), marks=[(0, 1, label)])
    blocks = [
        Cards([Card(EVIL, EVIL, EVIL, EVIL)]),
        Charts([chart]),
        Table(EVIL, [Column(EVIL, EVIL)], [Row(EVIL, [Cell(EVIL, EVIL, EVIL, EVIL)], EVIL)], EVIL, EVIL),
        Table(EVIL, [Column(EVIL, EVIL, True)], [Row(EVIL, [Cell(EVIL)], series=Series(EVIL, None))], EVIL),
        Paragraph(EVIL),
        Notes([(EVIL, EVIL)], EVIL),
        Notes([(EVIL, EVIL)]),
        Code(EVIL, EVIL),
        Example(EVIL, [Answer(EVIL, [(EVIL, 0.5), (EVIL, float("nan"))], EVIL)]),
    ]
    text = to_html(Page(EVIL, EVIL, [Section(EVIL, blocks)], EVIL))
    asks_nothing(text)
    assert "\x1b" not in text
    plots.png(chart)


# Files


def damage(run: Path, name: str, change: Callable[[str], str]) -> None:
    (run / name).write_text(change((run / name).read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "metrics.jsonl",
            lambda t: t.replace('"step": 7,', '"step" 7,', 1),
            r"metrics\.jsonl, line 7: .* expected a JSON object with",
        ),
        ("metrics.jsonl", lambda t: "[1]\n" + t, r"metrics\.jsonl, line 1: .* expected a JSON object with a step"),
        ("metrics.jsonl", lambda t: t.replace('"step": 7,', '"step": "7",', 1), r"line 7: .* JSON object with a step"),
        ("metrics.jsonl", lambda t: "[" * 100_000 + "\n" + t, r"metrics\.jsonl, line 1"),
        ("run.json", lambda t: t[:-5], r"run\.json: not JSON"),
        (
            "run.json",
            lambda t: t.replace('"version": 1', '"version": 2'),
            r"run\.json: got format 'fastkd-run', version 2",
        ),
        ("run.json", lambda t: "[]", r"run\.json: got list; expected a JSON object"),
        ("evaluation.json", lambda t: t[:-5], r"evaluation\.json: not JSON"),
        ("evaluation.json", lambda t: "{}", r"evaluation\.json: evaluation: got something else"),
        ("evaluation.json", lambda t: t.replace('"counts": [511.0', '"counts": ["x"'), r"evaluation\.json: .* damaged"),
        ("control/metrics.jsonl", lambda t: "x\n" + t, r"control/metrics\.jsonl, line 1"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, change: Any, message: str) -> None:
    damage(run, name, change)
    with pytest.raises(ReportError, match=message):
        read_run(run, "r")


def test_huge_files_are_refused_before_they_are_read(run: Path) -> None:
    for name in ("evaluation.json", "metrics.jsonl", "run.json"):
        os.truncate(run / name, 2**40)  # takes no space
        with pytest.raises(ReportError, match=rf"{name}: cannot be read .*got 1,099,511,627,776 bytes; expected"):
            read_run(run, "r")


ODD: list[Any] = [None, True, -1, 2**70, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "x\0", [], {}]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["run.json", "evaluation.json", "metrics.jsonl"])
def test_odd_values_make_a_page_or_are_refused(tmp_path: Path, name: str) -> None:
    """Values of a file, each replaced by an odd one."""
    run = write_run(tmp_path / "run", control=None, steps=40)
    whole = (run / name).read_text()
    document = [json.loads(line) for line in whole.splitlines()][-2:] if name == "metrics.jsonl" else json.loads(whole)
    paths, pages, refused = list(paths_of(document)), 0, 0
    for number in range(60):
        changed = replaced(document, paths[number % len(paths)], ODD[number % len(ODD)])
        lines = changed if name == "metrics.jsonl" and isinstance(changed, list) else [changed]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            to_html(page_of(read_runs([run])))
            pages += 1
        except ReportError as error:
            assert str(error).startswith(str(run / name)), error
            refused += 1
    assert pages + refused == 60
    assert min(pages, refused) > 2


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a document, of long lists only the first ones."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from paths_of(one, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def test_other_damage(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl: cannot be read"):
        read_run(run, "r")
    with pytest.raises(NoRun, match=r"no run\.json in it"):
        read_run(tmp_path, "r")
    with pytest.raises(NoRun, match="got none"):
        make_report([])
    (run / "metrics.jsonl").unlink()
    (run / "control" / "run.json").unlink()
    with pytest.raises(NoRun, match=r"control: no run\.json"):
        read_run(run, "r")
    shutil.rmtree(run / "control")
    with pytest.raises(ReportError, match=r"run\.json is no folder; expected a place in a folder"):
        make_report([run], run / "run.json" / "page.html")


def test_a_line_that_is_being_written_is_no_damage(run: Path) -> None:
    whole = read_run(run, "r")
    damage(run, "metrics.jsonl", lambda text: text + '{"step": 241, "lo')
    assert len(read_run(run, "r").steps) == len(whole.steps) == 240


def test_steps_that_were_logged_twice_count_once(run: Path) -> None:
    """A run that was killed goes on from a checkpoint before the last steps it had logged."""
    damage(run, "metrics.jsonl", lambda text: text + '{"step": 200, "loss": 9.5}\n{"step": 201, "loss": NaN}\n')
    found = read_run(run, "r")
    assert [s["step"] for s in found.steps] == list(range(1, 241))
    steps, losses = found.logged("loss")
    assert losses[steps.index(200)] == 9.5
    assert 201 not in steps


@pytest.mark.usefixtures("undrawn")
def test_waiting_is_weighed_by_time(run: Path) -> None:
    steps = [{"step": 1, "waiting": 0.5, "seconds": 9.0}, {"step": 2, "waiting": 0.1, "seconds": 1.0}, {"step": 3}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    assert "waiting for data 46 %" in page(run).text


def test_summaries() -> None:
    found = measured(
        {"a": 1, "b": {"mean": 2.0, "low": 1.5, "high": 2.5}, "c": None, "d": True, "perplexity": 3, "e": {}}
    )
    assert found == {"a": Interval(1.0, float("inf")), "b": Interval(2.0, 0.5)}
    assert measured([1]) == {}


def test_commands() -> None:
    assert in_lines(["fastkd", "a b"]) == "fastkd 'a b'"
    long = in_lines(["fastkd", "train", "--cache", "c" * 60, "--out", "a b", "--json"])
    assert long.split("\n") == ["fastkd train \\", f"    --cache {'c' * 60} \\", "    --out 'a b' \\", "    --json"]


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "--out", str(out), "--png"]) == 0
    assert str(out) in capsys.readouterr().out
    pngs = sorted(out.parent.glob("*.png"))
    assert len(pngs) == 12
    for path in pngs:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert min(width, height) > 500
    asks_nothing(out.read_text(encoding="utf-8"))
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert cli.main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(run / "report.html")
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "no run.json" in capsys.readouterr().err
    damage(run, "run.json", lambda text: "?")
    assert cli.main(["report", str(run)]) == 1


def test_the_same_runs_make_the_same_page(run: Path) -> None:
    runs = read_runs([run])
    assert to_html(page_of(runs)) == to_html(page_of(runs))


# Plots


def chart(lines: list[Line], **more: Any) -> Chart:
    return Chart("c", "title", "caption", "step", "nats", lines, **more)


def test_colours_are_the_pages() -> None:
    """Light and dark are the page's affair: no colour of its own is left in the drawing."""
    lines = [Line(Series("a", i), [0, 1], [i, i], ([i, i], [i + 1, i + 1])) for i in range(8)]
    text = plots.svg(chart([*lines, Line(Series("t", None), [0, 1], [0, 1])], level=(1.0, "level"), diagonal=True))
    assert not re.findall(r"#[0-9a-f]{6}\b", text)
    assert set(re.findall(r"var\(--(\w+)\)", text)) == {"ink", "grid", "grey", *(f"s{i}" for i in range(6))}
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert all(f"#{name}" in text for name in ids)
    assert not set(ids) & set(re.findall(r' id="([^"]*)"', plots.svg(chart(lines)._replace(name="d"))))


@pytest.mark.parametrize("values", [[1e308, -1e308], [5e-324, 0.0], [1e-300, 1e300]])
def test_extreme_values_are_drawn(values: list[float]) -> None:
    lines = [Line(Series("a", 0), [1, 2], values, (values, values), markers=True), Line(Series("b", 1), [3], [1.0])]
    assert "<svg" in plots.svg(chart(lines, level=(values[0], "level")))


def test_long_lines_are_thinned() -> None:
    """To the means of groups; what was logged in full would make pages of megabytes."""
    x = np.arange(100_000)
    text = plots.svg(chart([Line(Series("a", 0), x.tolist(), np.sin(x / 9000).tolist())]))
    assert len(text) < 30_000


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package(monkeypatch: pytest.MonkeyPatch, run: Path, package: str) -> None:
    render._environment.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReportError, match=rf"{package} is not installed.*pip install 'fastkd\[report\]'"):
        make_report([run])
    assert not (run / "report.html").exists()


def test_a_drawing_leaves_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.svg(chart([Line(Series("漢字 $x$", 0), [0, 1], [1.0, 2.0])]))
    assert dict(matplotlib.rcParams) == before


# Numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures(0.65432), "0.654"), (figures(12345.6), "12\u202f346"), (figures(1234.5), "1234"), (figures(0), "0"),
        (figures(0.0999, 2), "0.10"), (figures(-2.5), "−2.50"), (figures(3e-5), "3.00e−5"), (figures(None), "–"),
        (figures(float("nan")), "–"), (figures(float("inf")), "∞"), (figures(0.5, sign=True), "+0.500"),
        (decimals(-0.001, 2), "0.00"), (decimals(-0.001, 2, sign=True), "±0.00"),
        (percent(0.0025, 2), "0.25\u202f%"), (percent(None), "–"),
        (prefixed(113_240_000), "113\u202fM"), (prefixed(452_960_000, "B"), "453\u202fMB"), (prefixed(674.2), "674"),
        (prefixed(999.6), "1.00\u202fk"), (prefixed(None), "–"), (prefixed(12, "B"), "12.0\u202fB"),
        (seconds(0.312), "0.31\u202fs"), (seconds(48), "48\u202fs"), (seconds(59.7), "1\u202fmin"),
        (seconds(171.3), "2\u202fmin 51\u202fs"), (seconds(7500), "2\u202fh 5\u202fmin"), (seconds(None), "–"),
        (with_half(3.0164, 0.0512), ("3.016", "0.051")), (with_half(0.603, 0.0254, scale=100), ("60.3", "2.5")),
        (with_half(0.45, float("inf")), ("0.450", "")), (with_half(-0.1, 0.0099, sign=True), ("−0.1000", "0.0099")),
        (with_half(3.0, 0.0), ("3.00", "0.00")),
        (measure_text(-0.00001), "0.0000"), (measure_text(None), ""), (measure_text(-0.5), "-0.5000"),
        (difference_text(-0.0831, 0.0202), "-0.0831 ± 0.0202"), (difference_text(0.0, 0.0), "+0.0000 ± 0.0000"),
        (difference_text(-0.000121, 0.0000934), "-0.000121 ± 0.000093"),
        (difference_text(0.5, float("inf"), sign=False), "0.5000"),
    ],
)  # fmt: skip
def test_numbers(text: Any, expected: Any) -> None:
    assert text == expected


def test_verdicts() -> None:
    assert verdict(KL, Interval(-0.1, 0.05)) == "good"
    assert verdict(KL, Interval(0.1, 0.05)) == "bad"
    assert verdict(AGREEMENT, Interval(0.1, 0.05)) == "good"
    assert verdict(AGREEMENT, Interval(0.1, 0.1)) == "even"
    assert verdict(KL, Interval(-9.0, float("inf"))) == ""
    assert verdict(KL, Interval(0.0, 0.0)) == "even"
    found = cell(AGREEMENT, {"agreement": Interval(0.03, 0.01)}, difference=True)
    assert (found.text, found.more, found.tone, found.mark) == ("+3.0", "±\u202f1.0", "good", "better")
    assert cell(KL, {}, difference=True).text == cell(KL, {}).text == perplexity({}).text == "–"
    assert perplexity({"cross_entropy": Interval(3.0, 0.1)}) == Cell("20.1", "18.2–22.2")
    assert perplexity({"cross_entropy": Interval(3.0, float("inf"))}) == Cell("20.1")
    assert perplexity({"cross_entropy": Interval(800.0, 5.0)}).text
