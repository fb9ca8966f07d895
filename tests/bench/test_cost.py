"""The cost suite: what it makes of times, and that its steps do what they say."""

from pathlib import Path

import pytest
import torch

from fastkd.bench import bench_cost, bench_train
from fastkd.bench.page import charts_of
from fastkd.bench.table import Table
from fastkd.bench.timing import Timings
from fastkd.cache import open_cache


def rows_of(**milliseconds: float) -> Table:
    """Of 1,000 positions a run: a millisecond is a microsecond a position."""
    table = Table("cpu", "cost")
    bench_cost.write(table, Timings({name: [x] for name, x in milliseconds.items()}), 1000, 100.0, 10.0)
    return table


def test_break_even_and_all_students() -> None:
    table = rows_of(capture=1000.0, cached=400.0, dense=1200.0, targets=800.0)
    value = {row.name: row.value for row in table.rows}
    assert value["captured, once: a position"] == pytest.approx(1000.0)
    assert value["the cache has paid for itself, against teacher live, all outcomes"] == 2
    assert value["the cache has paid for itself, against teacher live, the same targets"] == 3
    # a million positions each
    assert value["1: one cache"] == pytest.approx(1400.0)
    assert value["10: one cache"] == pytest.approx(5000.0)
    assert value["10: teacher live, all outcomes"] == pytest.approx(12000.0)
    assert value["10: teacher live, the same targets"] == pytest.approx(8000.0)
    (chart,) = charts_of(table.recording())
    assert len(chart.lines) == 3
    assert all(list(line.x) == list(range(1, 11)) for line in chart.lines)


def test_a_cache_that_never_pays_says_so() -> None:
    table = rows_of(capture=1000.0, cached=400.0, dense=1200.0, targets=300.0)
    (row,) = (row for row in table.rows if row.note.startswith("never"))
    assert row.name.endswith("the same targets")
    assert row.value is None


def test_steps_from_the_cache_are_those_of_the_live_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"student": (16, 1, 2, 1, 32), "teacher": (32, 1, 2, 1, 64), "rows": 2, "length": 16}
    for module in (bench_cost, bench_train):
        monkeypatch.setattr(module, "VOCAB", 500)
    monkeypatch.setitem(bench_train.SIZES, "cpu", size)
    jobs = bench_cost.Jobs("cpu", tmp_path)
    begin = {name: value.clone() for name, value in jobs.student.state_dict().items()}
    norms = {}
    for name, step in {"cached": jobs.cached, "targets": jobs.targets, "dense": jobs.live}.items():
        jobs.student.load_state_dict(begin)
        norms[name] = step()[0]
    torch.testing.assert_close(norms["cached"], norms["targets"], rtol=1e-2, atol=0.0)  # stored in steps
    torch.testing.assert_close(norms["dense"], norms["targets"], rtol=0.1, atol=0.0)
    jobs.capture()
    jobs.capture()
    jobs.writer.close()
    assert open_cache(tmp_path / "written").shards == [0, 1]
