"""`fastkd report` of sweeps: what is on the page, against what `fastkd sweep` found."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from report_cases import CONTROL, STUDENT, evaluation, write_run

from fastkd.cli.main import main
from fastkd.errors import NoRun, ReportError
from fastkd.report.make import make_report
from fastkd.report.page import Charts, Series, Table
from fastkd.report.plots import style_of
from fastkd.report.runs import Comparison
from fastkd.report.sections.sweeps import build, series_of
from fastkd.report.sweeps import Sweep, read_sweep
from fastkd.sweep.arms import Arm
from fastkd.sweep.result import SWEEP, read_result, seed_noise, window_noise
from fastkd.sweep.result import make_report as ranking
from fastkd.utils.numbers import with_half

ARMS: dict[Arm, tuple[float, ...]] = {
    Arm((("alpha", 0.5), ("rate", 0.001))): STUDENT,
    Arm((("alpha", 1.0), ("rate", 0.001))): CONTROL,
    Arm((("alpha", 0.5), ("rate", 0.01))): (3.2, *STUDENT[1:]),
}


def write_sweep(folder: Path, arms: dict[Arm, tuple[float, ...]] = ARMS, seeds: int = 2, **more: Any) -> Path:
    """A finished sweep: its runs, and sweep.json as `fastkd sweep` writes it."""
    for arm, figures in arms.items():
        for seed in range(seeds):
            own = tuple(figure + 0.002 * (seed + len(arm.name)) for figure in figures)
            run = write_run(
                folder / arm.name / f"seed={seed}", own, control=None, steps=80, seed=seed, **dict(arm.changes)
            )
            document = json.loads((run / "run.json").read_text())
            document["report"] |= {"complete": True, "step": 80}
            (run / "run.json").write_text(json.dumps(document))
    found = {(arm, seed): read_result(folder / arm.name / f"seed={seed}") for arm in arms for seed in range(seeds)}
    report = ranking(folder, list(arms), list(range(seeds)), found, [1.0], measure="cross_entropy")
    document = report.to_json() | {"settings": {"alpha": 0.5, "alpha_end": None, "rate": 0.001}} | more
    (folder / SWEEP).write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("report") / "sweep")


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Sweep:
    return read_sweep(folder, "sweep")


def table_of(sweep: Sweep) -> Table:
    (section,) = build(Comparison([], sweeps=[sweep])) or []
    return next(block for block in section.blocks if isinstance(block, Table))


def test_arms_are_ranked_with_means_over_seeds_and_verdicts(sweep: Sweep) -> None:
    best, control, last = sweep.arms
    assert [arm.short for arm in sweep.arms] == ["α 0.5, rate 0.001", "α 1, rate 0.001", "α 0.5, rate 0.01"]
    rows = table_of(sweep).rows
    for arm, row in zip(sweep.arms, rows, strict=True):
        values = arm.values["cross_entropy"]
        mean, spread = with_half(fmean(values), stdev(values))
        assert (row.cells[0].text, row.cells[0].more.split()[-1]) == (mean, spread)
        assert row.note == "2 seeds"
    assert rows[0].marked
    assert rows[0].cells[-2].text == "best"
    # against hard labels with the same rate, by the wider of two intervals
    found = sweep.against(best, control)
    assert found is not None
    evaluations = [[[evaluation(tuple(f + 0.002 * (s + len(n)) for f in figures), seed=s)] for s in (0, 1)]
                   for n, figures in ((best.name, STUDENT), (control.name, CONTROL))]  # fmt: skip
    by_windows = window_noise(*evaluations, [1.0], "cross_entropy")
    by_seeds = seed_noise([arm.values["cross_entropy"] for arm in sweep.arms])
    assert found.mean == pytest.approx(fmean(best.values["cross_entropy"]) - fmean(control.values["cross_entropy"]))
    assert found.half == pytest.approx(max(by_windows, by_seeds))
    assert rows[0].cells[-1].mark in ("better", "no difference")
    assert rows[1].cells[-1].text == "–"  # the control itself
    assert sweep.control_of(last) is None  # of another rate
    assert rows[2].cells[-2].mark == "worse"


@pytest.mark.usefixtures("undrawn")
def test_one_seed_has_no_interval_and_no_infinity(tmp_path: Path) -> None:
    rows = table_of(read_sweep(write_sweep(tmp_path / "s", seeds=1), "s")).rows
    assert [cell.mark for cell in rows[1].cells[-2:]] == ["no interval", ""]
    assert [(cell.more, cell.mark) for cell in rows[0].cells[-2:]] == [("", ""), ("", "no interval")]
    make_report([tmp_path / "s"])
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "∞" not in page
    assert "nats against hard labels alone" in page


def test_its_plots(sweep: Sweep) -> None:
    (section,) = build(Comparison([], sweeps=[sweep])) or []
    (charts,) = [block.charts for block in section.blocks if isinstance(block, Charts)]
    ranking, curves = charts
    assert [one.mean for one in ranking.spreads] == sorted(one.mean for one in ranking.spreads)
    assert [len(one.values) for one in ranking.spreads] == [2, 2, 2]
    assert [len(line.x) for line in curves.lines] == [2, 2, 2]
    first = [run.points[0].measures["cross_entropy"].mean for run in sweep.runs_of[sweep.arms[0].name]]
    assert curves.lines[0].y[0] == pytest.approx(fmean(first))
    assert [line.series.dashed for line in curves.lines] == [False, True, False]
    assert ranking.x_label == "cross-entropy, nats"


def test_the_page_lies_in_the_sweeps_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    for words in (
        "Sweep: sweep",
        "1. α 0.5, rate 0.001",
        "against hard labels",
        "Ranking by cross-entropy",
        "fastkd train",
    ):
        assert words in text
    assert 'role="img" aria-label="Ranking by cross-entropy' in text


@pytest.mark.usefixtures("undrawn")
def test_beside_runs_and_other_sweeps(folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "alone")
    found = make_report([run, folder], tmp_path / "both.html")
    assert (found["runs"], found["sweeps"]) == (["alone"], ["sweep"])
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert text.index("Sweep: sweep") < text.index("Held-out data")
    assert "sweep and 1 run" in text


@pytest.mark.usefixtures("undrawn")
def test_arms_without_a_result(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s")
    document = json.loads((folder / SWEEP).read_text())
    document["arms"][2] |= {"diverged": {"0": "loss is nan"}, "behind": None}
    document |= {"complete": False, "best": None}
    (folder / SWEEP).write_text(json.dumps(document))
    row = table_of(read_sweep(folder, "s")).rows[2]
    assert row.note == "diverged (seed 0)"
    assert {cell.text for cell in row.cells} == {"–"}
    make_report([folder])
    assert "This sweep is not complete" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_halving(tmp_path: Path) -> None:
    step = {"step": 4, "arms": [
        {"name": "alpha=0.5", "value": 3.0, "kept": True, "behind": None},
        {"name": "alpha=1", "value": 3.1, "kept": False, "behind": {"mean": 0.1, "low": 0.05, "high": 0.15}},
        {"name": "alpha=0", "value": None, "kept": False, "behind": None},
    ]}  # fmt: skip
    last = {"step": 8, "arms": [{"name": "alpha=0.5", "value": 2.5, "kept": True, "behind": None}]}
    document = {
        "format": "fastkd-sweep", "version": 1, "auto": True, "complete": True, "seed": 0, "steps": 8,
        "measure": "cross_entropy", "arms": {f"alpha={a:g}": {"alpha": a} for a in (0.5, 1.0, 0.0)},
        "rungs": [step, last], "chosen": "alpha=0.5", "default": "alpha=0.5", "hard": "alpha=1",
        "verdict": "Chosen so.",
    }  # fmt: skip
    (tmp_path / SWEEP).write_text(json.dumps(document))
    rows = table_of(read_sweep(tmp_path, "auto")).rows
    assert [row.name for row in rows] == ["α 0.5", "α 1", "α 0"]
    assert [cell.text for cell in rows[0].cells] == ["3.000", "2.500", "chosen"]
    assert [(cell.text, cell.mark) for cell in rows[1].cells] == [("3.100", ""), ("–", ""), ("0.100", "worse")]
    assert rows[1].note == "hard labels alone"
    assert [cell.text for cell in rows[2].cells] == ["diverged", "–", "–"]
    make_report([tmp_path])
    assert "Chosen so." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_lines_are_told_apart_by_more_than_colour() -> None:
    styles = [style_of(Series(str(number), number)) for number in range(24)]
    assert len({(how.colour, how.marker) for how in styles}) == 24
    assert len({how.marker for how in styles[:6]}) == 6
    assert len({(how.marker, str(how.dashes)) for how in styles[:12]}) == 12  # in grey, too
    assert style_of(Series("control", 1, dashed=True)).dashes != "-"


def test_more_arms_than_a_reader_can_follow_are_grey(sweep: Sweep) -> None:
    many = [sweep.arms[0].__class__(f"alpha={n}", {"alpha": float(n)}, [], {}) for n in range(12)]
    series = series_of(Sweep("many", sweep.folder, sweep.document, many))
    assert [one.colour for one in series.values()] == [*range(8), *[None] * 4]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"format": "other"}', "got format 'other', version 1; expected fastkd-sweep 1"),
        ('{"arms": [{"name": 3}], "seeds": [0]}', "got no arms of a sweep"),
        ('{"auto": true, "arms": {}, "rungs": 3}', "got no arms of a sweep"),
    ],
)
def test_what_is_no_sweep_is_refused_in_a_sentence(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / SWEEP).write_text(text)
    with pytest.raises(ReportError, match=r"sweep\.json") as error:
        make_report([tmp_path])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(NoRun, match=r"expected a folder that `fastkd train` or `fastkd sweep` wrote\."):
        make_report([tmp_path])
    write_run(tmp_path / "within" / "run", control=None, steps=1)
    with pytest.raises(NoRun, match=r"wrote, such as .*within/run\."):
        make_report([tmp_path])
    (tmp_path / "auto.json").write_text("{}")
    with pytest.raises(NoRun, match=r"no sweep\.json in it yet\. Run the same sweep again"):
        make_report([tmp_path])
