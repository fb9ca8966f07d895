"""The measurements' own parts: turns and medians with a made-up clock, the registry, recordings, what check says."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.bench import (
    bench_head,
    bench_scale,
    check,
    logits_problem,
    peers,
    run,
)
from fastkd.bench.cases import eager_kd_loss
from fastkd.bench.harness import Rotation, copies
from fastkd.bench.head_model import Rates, predict
from fastkd.bench.load import LoadMeter, busy_ticks, load_of, load_text
from fastkd.bench.page import charts_of, page_of
from fastkd.bench.records import SEQUENCES, opening, records, write_records
from fastkd.bench.results import markdown
from fastkd.bench.suites import (
    SUITES,
    Case,
    RunConfig,
    Suite,
    listing,
    named,
)
from fastkd.bench.table import Recording, Row, Table, load, save
from fastkd.bench.timing import Figure, figure, interleaved
from fastkd.cache import CacheSpec, open_cache
from fastkd.cli import main as cli
from fastkd.errors import NoSuite, ReportError
from fastkd.report.page import Charts, Page, Section
from fastkd.report.plots import style_of, svg
from fastkd.report.render import to_html
from fastkd.stream.epoch_order import Sequences

MACHINE = {"device": "cpu", "name": "made up", "cores": 2, "threads": 2}


class TestHarness:
    def test_runs_take_turns_and_warm_ups_are_not_counted(self) -> None:
        order: list[str] = []
        takes = iter([100.0, 200.0, 1.0, 4.0, 3.0, 6.0, 2.0, 8.0])

        def timer(call: Callable[[], object]) -> float:
            call()
            return next(takes)

        runs = {name: (lambda name=name: order.append(name)) for name in "AB"}
        found = interleaved(
            runs, device="cpu", rounds=3, warmup=1, timer=timer, before={"B": lambda: order.append("before B")}
        )
        assert order == ["A", "before B", "B"] * 4
        assert found.rounds == {"A": [1.0, 3.0, 2.0], "B": [4.0, 6.0, 8.0]}
        assert (found["A"], found["B"]) == (2.0, 6.0)
        # round by round: 4, 2 and 4; the ratio of the medians would be 3
        assert found.ratio("B", "A").median == 4.0

    def test_percentiles(self) -> None:
        found = figure([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
        assert found == Figure(3.5, 2.0, 5.0)
        assert found.inverse(10.0) == Figure(10 / 3.5, 2.0, 5.0)
        assert found.scaled(2) == Figure(7.0, 4.0, 10.0)

    def test_inputs_rotate(self) -> None:
        seen: list[int] = []
        ring = Rotation([1, 2, 3])
        step = ring.run(seen.append)
        for _ in range(4):
            step()
        assert seen == [1, 2, 3, 1]
        assert ring.last == 1

    @pytest.mark.parametrize(("size", "cache"), [(10, 100), (33, 100), (101, 100), (1 << 31, 1 << 20)])
    def test_an_input_has_left_the_cache_when_its_turn_comes(self, size: int, cache: int) -> None:
        others = copies(size, cache) - 1
        assert others >= 1
        assert others * size >= cache


class TestProblems:
    """What is set side by side computes the same thing, on inputs that the run before did not leave behind."""

    @pytest.fixture(autouse=True)
    def _few_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three, however small they are."""
        for module in (bench_head, logits_problem):
            monkeypatch.setattr(module, "rotation", lambda make, size, device: Rotation([make() for _ in range(3)]))

    def test_the_head(self) -> None:
        problem = bench_head.HeadProblem("cpu", 12, 8, 60, 4)
        rest = peers.eager_on(problem.targets, problem.labels, problem.temperature)
        ours, eager = problem.ours(), problem.step(lambda hidden, weight: peers.eager_head(hidden, weight, *rest))
        found = []
        for step in (ours, eager):
            problem.ring = Rotation(problem.ring.inputs)  # both get the first
            found.append(step())
        for one, other in zip(*found, strict=True):
            assert one is not None
            assert one.any()
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        assert all(x.grad is None for pair in problem.ring.inputs for x in pair)

    def test_the_logits(self) -> None:
        problem = logits_problem.LogitsProblem("cpu", 6, 60, 4)
        rest = peers.eager_on(problem.bucket, problem.labels, problem.temperature)
        settings = {"treatment": "bucket", "temperature": problem.temperature}
        kept = problem.ours(inplace=False, **settings)()
        eager = problem.step(lambda leaf: eager_kd_loss(leaf, *rest))()
        (one,), (other,) = kept, eager
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        assert problem.ours(inplace=True, **settings)() == []  # its gradient is no memory more
        torch.testing.assert_close(problem.ring.last, one)
        problem.restore()
        problem.copy()
        assert all(torch.equal(logits, problem.pristine) for logits in problem.ring.inputs)

    def test_peers_that_need_a_gpu_say_so(self) -> None:
        problem = bench_head.HeadProblem("cpu", 12, 8, 60, 4)
        found = [peer for peer in peers.of_head(problem) if not peer.name.startswith("torch")]
        (one,) = found  # one row, however many there are
        assert (one.run, one.why) == (None, "need a GPU")
        assert one.name == f"{len(peers.HEAD_NAMES) - 3} losses of liger-kernel, quack-kernels, cut-cross-entropy"

    def test_torch_s_fused_head_is_measured_where_torch_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = bench_head.HeadProblem("cpu", 12, 8, 60, 4)
        of_torch = peers.of_head(problem)[:3]
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            steps = [peer.run for peer in of_torch]
            steps.append(problem.step(lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, problem.labels)))
            found = []
            for step in steps:
                problem.ring = Rotation(problem.ring.inputs)
                assert step is not None
                found.append(step())
            for one in found[:3]:
                torch.testing.assert_close(one, found[3], atol=1e-6, rtol=1e-4)
            monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *_, **__: 1 / 0)
            assert {peer.why for peer in peers.of_head(problem)[:3]} == {
                "fails here: ZeroDivisionError: division by zero"
            }
            monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
        assert all("needs torch 2.13" in peer.why for peer in peers.of_head(problem)[:3])


class TestSuites:
    @pytest.mark.parametrize("name", SUITES)
    @pytest.mark.parametrize("full", [False, True])
    def test_each_says_what_it_would_measure(self, name: str, full: bool) -> None:
        suite = SUITES[name]
        for device in suite.devices:
            cases = suite.cases(RunConfig(device, full=full))
            names = [case.name for case in cases]
            assert names
            assert len(set(names)) == len(names)

    def test_every_file_is_registered(self) -> None:
        folder = Path(run.__file__).parent
        assert {suite.module for suite in SUITES.values()} == {path.stem for path in folder.glob("bench_*.py")}

    def test_names(self) -> None:
        assert [suite.name for suite in named(["topk", "loss"])] == ["loss", "topk"]
        assert named([]) == [suite for suite in SUITES.values() if not suite.named_only]
        with pytest.raises(NoSuite, match=r"nothing, less: no such suite\..* loss, .*quality"):
            named(["nothing", "loss", "less"])

    def test_a_suite_runs_on_a_device_it_has(self, capsys: pytest.CaptureFixture[str]) -> None:
        class Fake(Suite):
            def cases(self, ask: RunConfig) -> list[Case]:
                assert ask.device == "cpu"
                return [Case("one", lambda table: table.value("a", 1.0, "s")), Case("two", lambda table: None)]

        said: list[str] = []
        kept: list[Recording] = []
        suites = [Fake("fake", "none", "", ("cpu",))]
        (found,), _ = run.run_suites(suites, RunConfig("cuda"), say=said.append, keep=kept.extend)
        assert [[row.name for row in one.rows] for one in kept] == [["a"], ["a"]]  # after each case
        assert (found.suite, found.size, [row.name for row in found.rows]) == ("fake", "small", ["a"])
        assert said[0] == "fake case 1 of 2 (0%, 0 s so far): one"
        assert said[1].startswith("fake case 2 of 2 (50%, 0 s so far, about 0 s left): two")

    def test_one_that_fails_takes_no_other_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each has a process of its own; what is there is kept after each."""
        commands: list[list[str]] = []

        def process(command: list[str]) -> SimpleNamespace:
            commands.append(command)
            fails = "head" in command
            if not fails:
                save([recording(row(1.0), suite=command[4])], Path(command[command.index("--json") + 1]))
            return SimpleNamespace(returncode=int(fails))

        monkeypatch.setattr(run.subprocess, "run", process)
        kept: list[int] = []
        found, failed = run.run_suites(
            named(["loss", "head", "topk"]),
            RunConfig("cpu", full=True, peers=True, rounds=3),
            say=lambda text: None,
            keep=lambda found: kept.append(len(found)),
        )
        assert [one.suite for one in found] == ["loss", "topk"]
        assert failed == ["head"]
        assert kept == [1, 1, 2]
        assert [command[4] for command in commands] == ["loss", "head", "topk"]
        assert all(command[-4:] == ["--full", "--peers", "--rounds", "3"] for command in commands)

    def test_how_far(self) -> None:
        assert run.progress(3, 4, "suite", "x", 90.0) == "suite 4 of 4 (75%, 90 s so far, about 30 s left): x"


def recording(*rows: Row, suite: str = "loss", **more: Any) -> Recording:
    """Rows on a made-up machine."""
    return Recording(
        **({"suite": suite, "size": "small", "hardware": MACHINE, "versions": {}, "seconds": 1.0} | more), rows=rows
    )


def row(value: float, spread: float = 0.0, **more: Any) -> Row:
    """A ratio, with p20 and p80 so far from it."""
    fields: dict[str, Any] = {"name": "ours", "case": "N=1", "ratio": value, "better": "lower"}
    return Row(**(fields | {"p20": value * (1 - spread), "p80": value * (1 + spread)} | more))


class TestRecordings:
    def test_one_shape(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        table = Table("cpu", "loss")
        table.title("N=8")
        table.ratio(
            "ours",
            Figure(1.2, 1.1, 1.3),
            "a copy",
            "<= 1.15",
            value=Figure(3.0, 2.5, 3.5),
            unit="GB/s",
            at={"N": 8},
            line="ours",
        )
        table.value("bytes", 98.0, "bytes", "<= 104", better="lower")
        table.absent("theirs", "needs a GPU")
        table.save(tmp_path / "rows.json")
        (found,) = json.loads((tmp_path / "rows.json").read_text())
        assert set(found) == {"suite", "size", "hardware", "versions", "seconds", "rows", "load"}
        assert found["hardware"]["device"] == "cpu"
        assert {"python", "torch"} <= set(found["versions"])
        ratio, value, absent = found["rows"]
        assert (ratio["ratio"], ratio["p20"], ratio["p80"], ratio["limit"]) == (1.2, 1.1, 1.3, "<= 1.15")
        assert (ratio["value"], ratio["value_p20"], ratio["value_p80"]) == (3.0, 2.5, 3.5)
        assert (ratio["verdict"], ratio["over"], ratio["case"], ratio["at"]) == ("MISSED", "a copy", "N=8", {"N": 8})
        assert (value.get("ratio"), value["value"], value["verdict"]) == (None, 98.0, "ok")
        assert absent == {"name": "theirs", "case": "N=8", "note": "needs a GPU"}
        assert load(tmp_path / "rows.json")[0] == table.recording().__class__(
            **{**vars(table.recording()), "seconds": found["seconds"], "load": found["load"]}
        )
        out = capsys.readouterr().out
        assert "MISSED" in out
        assert "needs a GPU" in out

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"suite": "loss"}]'])
    def test_another_file_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "rows.json"
        path.write_text(text)
        with pytest.raises(ReportError, match=r"rows\.json: not recordings"):
            load(path)


class TestCheck:
    @pytest.mark.parametrize(
        ("before", "after", "moved", "worse"),
        [
            (row(1.0), row(1.01), False, False),  # within 2%
            (row(1.0), row(1.1), True, True),
            (row(1.0), row(0.9), True, False),
            (row(1.0, 0.06), row(1.1, 0.06), False, False),  # within the spread of both
            (row(1.0, 0.02), row(1.1, 0.02), True, True),
            (row(1.0, better="higher"), row(1.1, better="higher"), True, False),
            (row(1.0, better="higher"), row(0.9, better="higher"), True, True),
            (row(0.0), row(1.0), True, True),  # shards that differ
            (row(0.0), row(0.0), False, False),
        ],
    )
    def test_what_moved(self, before: Row, after: Row, moved: bool, worse: bool) -> None:
        (move,) = check.compare([recording(before)], [recording(after)])
        assert (move.moved, move.worse) == (moved, worse)
        assert check.worse([move]) == worse

    def test_two_runs_say_what_noise_is(self) -> None:
        before = [recording(row(1.0)), recording(row(1.2))]
        assert not check.compare(before, [recording(row(1.15))])[0].moved
        assert check.compare(before, [recording(row(1.3))])[0].worse

    def test_ratios_over_several_runs_are_told_apart(self) -> None:
        before = [recording(row(1.0, over="a copy"), row(3.0, over="eager"))]
        after = [recording(row(1.0, over="a copy"), row(6.0, over="eager"))]
        assert [(m.name, m.moved) for m in check.compare(before, after)] == [
            ("ours, over a copy", False),
            ("ours, over eager", True),
        ]

    def test_times_are_not_compared(self) -> None:
        time = Row("a", "N=1", value=3.0, unit="ms")
        assert check.compare([recording(time)], [recording(replace(time, value=30.0))]) == []

    def test_other_cases_sizes_and_suites_are_others(self) -> None:
        before = [recording(row(1.0))]
        others = [recording(row(2.0, case="N=2")), recording(row(2.0), size="full"), recording(row(2.0), suite="head")]
        assert check.compare(before, others) == []
        assert check.unmatched(before, [recording(row(2.0, case="N=2"))]) == ["N=1: ours"]
        assert check.unmatched(before, [recording(row(2.0), suite="head")]) == []

    def test_it_says_what_is_worse_first(self) -> None:
        before = [recording(row(1.0), row(1.0, name="better"), row(1.0, name="same"), row(1.0, name="gone"))]
        after = [recording(row(1.5), row(0.5, name="better"), row(1.0, name="same"))]
        lines = check.text(before, after).splitlines()
        assert lines[0] == "compared with the recording on made up, 2 cores: 3 rows, 2 moved, 1 of them worse"
        assert "WORSE  1 -> 1.5 (+50.0%, noise 2.0%)  loss: N=1: ours" in lines[1]
        assert "better" in lines[2]
        assert lines[3].endswith("not measured any more: N=1: gone")

    def test_what_comes_with_fastkd_is_of_some_hardware(self) -> None:
        with pytest.raises(NoSuite, match=r"no recording of made up, 2 cores; there are: .*--against FILE"):
            check.of_same_hardware([recording(row(1.0))], check.bundled())


class TestCommand:
    def test_listing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["bench", "--list"]) == 0
        said = capsys.readouterr().out
        assert said.strip() == listing().strip()
        assert [line.split()[0] for line in said.splitlines() if "only if it is named" in line] == [
            "sass", "cluster", "server", "trl",
        ]  # fmt: skip

    def test_a_suite_is_kept_after_each_case(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And compared with what was in the file before."""
        path = tmp_path / "rows.json"

        def stop(table: Table) -> None:
            raise KeyboardInterrupt

        cases = [Case("one", lambda table: table.ratio("ours", 2.0, "a copy"))]
        monkeypatch.setattr(bench_scale, "cases", lambda ask: cases)
        assert cli.main(["bench", "scale", "--json", str(path)]) == 0
        assert [row.name for row in load(path)[0].rows] == ["ours"]
        cases[:] = [Case("one", lambda table: table.ratio("ours", 9.0, "a copy"))]
        assert cli.main(["bench", "scale", "--json", str(path), "--check", "--against", str(path)]) == 1
        cases.append(Case("two", stop))
        path.unlink()
        cli.main(["bench", "scale", "--json", str(path)])
        assert [row.ratio for row in load(path)[0].rows] == [9.0]

    def test_recordings_of_a_suite_that_runs_only_if_named_are_used(self, tmp_path: Path) -> None:
        path, tables = tmp_path / "rows.json", tmp_path / "tables.md"
        save([recording(row(1.0), suite="sass")], path)
        assert cli.main(["bench", "--use", str(path), "--markdown", str(tables)]) == 0
        assert "## sass" in tables.read_text()

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            (["nothing"], 2, "no such suite"),
            (["--device", "tpu"], 1, "--device: got tpu; expected cpu or cuda"),
            (["--runs", "0"], 1, "at least 1"),
            (["--against", "x.json"], 1, "add --check"),
            (["--use", "missing.json"], 1, "missing.json: not recordings"),
        ],
    )
    def test_errors(self, arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["bench", *arguments]) == status
        found = capsys.readouterr()
        assert says in found.err
        assert "Traceback" not in found.err

    def test_check_of_recordings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        save([recording(row(1.0))], old)
        for value, status in ((1.0, 0), (0.5, 0), (2.0, 1)):
            save([recording(row(value))], new)
            assert cli.main(["bench", "--use", str(new), "--check", "--against", str(old)]) == status
        assert "WORSE" in capsys.readouterr().out
        assert cli.main(["bench", "head", "--use", str(new)]) == 1  # nothing of it in there
        assert "no recordings of head" in capsys.readouterr().err


def sized(v: int, name: str, value: float, unit: str = "GB/s", n: int = 8, **more: Any) -> Row:
    """A row of one size, for plots."""
    return Row(name, f"N={n} V={v}", value=value, unit=unit, line=name, at={"N": n, "V": v}, **more)


class TestResults:
    rows = (
        *(
            sized(v, name, rate)
            for v in (100, 1000)
            for name, rate in (("limit", 10.0), ("ours", 9.0), ("theirs", 99.0))
        ),
        sized(100, "ours", 8.0, n=16),
        sized(100, "ours", 3.0, "MiB"),
        row(1.2, limit="<= 1.15", over="a copy", name="ours | slow"),
        Row("Liger", "N=1", note="needs a GPU"),
    )

    def test_plots_are_of_one_size_each(self) -> None:
        charts = {chart.name: chart for chart in charts_of(recording(*self.rows))}
        assert set(charts) == {"loss-GB_s-N", "loss-GB_s-V"}  # of memory there is one point
        lines = {line.series.name: line for line in charts["loss-GB_s-V"].lines}
        assert lines["ours"].x == [100, 1000]
        assert lines["ours"].y == [9.0, 9.0]
        assert lines["theirs"].y == [99.0, 99.0]  # what wins stays in
        (limit,) = (line for line in lines.values() if line.series.colour is None)
        assert limit.y == [10.0, 10.0]
        (by_n,) = (line for line in charts["loss-GB_s-N"].lines if line.series.name == "ours")
        assert (by_n.x, by_n.y) == ([8, 16], [9.0, 8.0])

    def test_ranges_are_bands_and_limits_are_drawn_as_the_legend_says(self) -> None:
        rows = [replace(sized(v, "ours", 9.0), p20=8.5, p80=9.5) for v in (100, 1000)]
        (chart,) = charts_of(recording(*rows, *(sized(v, "limit", 10.0) for v in (100, 1000))))
        bands = {line.series.name: line.band for line in chart.lines}
        assert bands == {"ours": ([8.5, 8.5], [9.5, 9.5]), "limit, measured in the same run": None}
        assert "20th to 80th percentile" in chart.caption
        key = to_html(Page("", "", [Section("", [Charts([chart])])]))
        dashes = style_of(next(line.series for line in chart.lines if line.series.colour is None)).dashes
        assert f'stroke-dasharray="{dashes[1][0]} {dashes[1][1]}"' in key
        drawn = re.search(r"stroke-dasharray: ([\d.]+),([\d.]+)", svg(chart))
        assert drawn is not None
        assert float(drawn[1]) / float(drawn[2]) == pytest.approx(dashes[1][0] / dashes[1][1])

    def test_the_load_of_the_machine(self) -> None:
        noisy = load_of(0.4, 2.2, 2, 0.6)
        assert noisy["quiet"] is False
        assert "NOT QUIET" in load_text(noisy)
        assert load_text(load_of(0.0, 2.0, 2, 0.04)) == (
            "load average 0.00 before, 2.00 after, on 2 cores; other processes used 0.04 cores: quiet"
        )
        assert load_of(0.3, 2.0, 2, None)["quiet"] is False
        assert "not known" in load_text(load_of(None, None, 2, None))
        found = replace(recording(*self.rows), load=noisy)
        assert "The machine: load average 0.40 before" in markdown([found])
        text = to_html(page_of([found]))
        assert "load average 0.40 before, 2.20 after, on 2 cores; other processes used 0.60 cores: NOT QUIET" in text
        assert "Quiet machine" in text
        assert "Quiet machine" not in to_html(page_of([recording(*self.rows)]))  # an old file

    def test_own_work_is_not_that_of_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([(100.0, 50.0, 5.0), (110.0, 62.0, 14.0)])
        monkeypatch.setattr(LoadMeter, "_now", staticmethod(lambda: next(times)))
        assert LoadMeter().load()["others"] == pytest.approx(0.3)
        cores = ["cpu 99 99 99 99 99 99 99 99 0 0", "cpu0 1 2 3 9 9 4 5 6 0 0", "cpu1 10 0 0 9 9 0 0 0 0 0"]
        stat = "\n".join([*cores, "cpu10 7 0 0 0 0 0 0 0 0 0", "intr 1 2"])
        assert [busy_ticks(stat, of) for of in ([0], [1], [0, 10])] == [21, 10, 28]

    def test_tables_have_every_row(self) -> None:
        text = markdown([recording(row(7.0)), recording(*self.rows)])
        assert "made up, 2 cores" in text
        assert "| ours \\| slow | 1.2x (1.2 to 1.2) | <= 1.15 **MISSED** | over a copy |" in text
        assert "| Liger | - |  | needs a GPU |" in text
        assert "7x" not in text  # the last recording of a suite counts
        assert text.count("\n| ") - text.count("\n| |") == len(self.rows)

    def test_files(self, tmp_path: Path) -> None:
        save([recording(*self.rows)], tmp_path / "rows.json")
        page, tables = tmp_path / "a" / "page.html", tmp_path / "RESULTS.md"
        command = ["bench", "--use", str(tmp_path / "rows.json"), "--page", str(page), "--markdown", str(tables)]
        assert cli.main(command) == 0
        html = page.read_text()
        assert html.count("<svg") > 2
        assert "0 of 1" in html
        assert "://" not in html
        assert tables.read_text() == markdown([recording(*self.rows)])


def test_records_are_a_manifest(tmp_path: Path) -> None:
    spec = CacheSpec(vocab_size=100, k=4, teacher="none")
    write_records(tmp_path, spec, records(50))
    cache = open_cache(tmp_path)
    assert (len(cache.shards), cache.sealed) == (50, True)
    assert opening(tmp_path, 50, 1).requests == 2


def test_an_order_that_repeats_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __len__(self) -> int:
            return 4 * SEQUENCES

        def take(self, start: int, stop: int) -> Sequences:
            return Sequences(*(np.zeros(stop - start, np.int64) for _ in range(3)))

    monkeypatch.setattr(bench_scale, "order", lambda *_, **__: Broken())
    with pytest.raises(AssertionError, match="repeats a sequence"):
        bench_scale.bench_order(Table("cpu"), 2 * 2**20, places=1)


class TestHeadModel:
    def test_large_heads_take_little_more_than_their_products(self) -> None:
        """On paper: three bare products over the time, at the sizes that have a bound."""
        shares = [predict(n, d, v).share for n, d, v, _ in bench_head.CUDA_SIZES]
        assert shares[0] >= 0.95
        assert shares == sorted(shares, reverse=True)

    def test_parts_follow_from_the_rates(self) -> None:
        """8 chunks of 2048 over 16384 tokens: written once, read and written 7 times, then read and rounded."""
        found = predict(16384, 64, 200_000, Rates(1.0, 1.0), loss=1.0, seen=1.0)
        assert found.chunks == 8
        assert found.products == pytest.approx(6e-9 * 16384 * 64 * 200_000)
        assert found.loss == pytest.approx(4e-9 * 16384 * 200_000)
        assert found.sums == pytest.approx(12.8e6 * (4 + 7 * 8 - 2) * 1e-9)
        assert found.cast == pytest.approx(12.8e6 * 6e-9)
        once = predict(100, 128, 200_000, Rates(1.0, 1.0))
        assert (once.chunks, once.sums, once.cast) == (1, 0, 0)
        assert "1 chunk: products" in str(once)
