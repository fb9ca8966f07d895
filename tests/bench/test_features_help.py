"""The part of the features suite that trains students: on few digits and bytes, and how it judges them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fastkd.bench import features_help
from fastkd.bench.features_help import Setting, differences, run, verdict
from fastkd.bench.features_problem import (
    LENGTH,
    ByteModel,
    Problem,
    bytes_problem,
    digits_problem,
    documents_of,
    made,
    train_byte_teacher,
)
from fastkd.bench.run import run_cases
from fastkd.bench.suites import RunConfig
from fastkd.bench.table import Table
from fastkd.errors import DataError
from fastkd.utils.intervals import Interval


def test_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both problems, tiny: each row is there, and a difference is with features minus without, by seed."""
    digits, text = partial(digits_problem, images=60, epochs=1), partial(bytes_problem, steps=3, count=60)
    monkeypatch.setattr(features_help, "digits_problem", digits)
    monkeypatch.setattr(features_help, "bytes_problem", text)
    given = features_help.settings_of

    def short(digits: Callable[[], Problem], text: Callable[[], Problem]) -> list[Setting]:
        return [replace(one, changes={**one.changes, "steps": 2}) for one in given(digits, text)]

    monkeypatch.setattr(features_help, "settings_of", short)
    table = Table("cpu", "features", size="small")
    run_cases(features_help.cases(RunConfig("cpu", rounds=2)), table, lambda text: None)
    titles = list(dict.fromkeys(row.case for row in table.rows))
    assert [title.partition(":")[0] for title in titles] == ["50 digits", "all digits", "64 documents"]
    seen = set()
    for row in table.rows:
        arm, _, name = row.name.partition(": ")
        seen.add((row.case.partition(":")[0], arm))
        if arm != "without features" and "upper end" not in name:
            (base,) = (r for r in table.rows if r.case == row.case and r.name == f"without features: {name}")
            assert row.value is not None
            assert base.value is not None
            assert row.value != base.value
            # the median of two is their mean
            assert f": {row.value - base.value:+.4f} ± " in row.note
    assert seen >= {("50 digits", "attention transfer"), ("all digits", "similarity"), ("64 documents", "states")}
    limited = [row.name for row in table.rows if row.limit]
    assert limited == [f"{arm}: KL from the teacher, upper end of the difference" for arm in ("similarity", "states")]


def test_without_a_package() -> None:
    def make() -> Problem:
        raise DataError("the digits come with scikit-learn")

    table = Table("cpu", "features", size="small")
    run(table, Setting("some", make, {}, {"steps": 1}), seeds=2)
    (row,) = table.rows
    assert row.figure is None
    assert row.note == "the digits come with scikit-learn"


def test_a_difference_is_paired_by_seed() -> None:
    with_ = [{"kl_bucket": 1.0, "cross_entropy": 2.0}, {"kl_bucket": 3.0, "cross_entropy": 2.0}]
    without = [{"kl_bucket": 1.5, "cross_entropy": 2.0}, {"kl_bucket": 3.5, "cross_entropy": 2.5}]
    found = differences(with_, without)
    assert found["kl_bucket"] == pytest.approx(Interval(-0.5, 0.0))
    assert found["cross_entropy"].mean == -0.25
    assert verdict(found["kl_bucket"]) == "features help"
    assert verdict(found["cross_entropy"]) == "no difference"
    assert verdict(Interval(0.2, 0.1)) == "features do harm"


def test_the_byte_model_is_causal_and_learns() -> None:
    documents, vocabulary = documents_of("abcdefgh" * 400)
    assert documents.shape == (50, LENGTH)
    assert vocabulary == 8
    model = made(ByteModel, vocabulary, 16, 2, 2, seed=0)
    assert isinstance(model, ByteModel)
    tokens = torch.from_numpy(documents[:2]).long()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 8
    with torch.no_grad():
        one, other = (model(x).states for x in (tokens, changed))
    torch.testing.assert_close(one[:, :-1], other[:, :-1])
    assert not torch.allclose(one[:, -1], other[:, -1])

    def loss() -> float:
        with torch.no_grad():
            found = model(tokens[:, :-1])
            logits = found.states @ found.lm_head.weight.T
            return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    before = loss()
    train_byte_teacher(model, documents, steps=100)
    assert loss() < before / 2


def test_students_are_of_their_seed() -> None:
    state = torch.get_rng_state()
    one, same, other = (made(ByteModel, 8, 16, 1, 2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, same[name]) for name, x in one.items())
    assert any(not torch.equal(x, other[name]) for name, x in one.items())
    assert np.isfinite([float(x.sum()) for x in one.values()]).all()
