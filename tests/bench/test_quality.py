"""The quality suite on a made-up teacher: what students learn from, how they are scored; and the gradient's figures."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastkd.bench import treatments
from fastkd.bench.bench_quality import (
    HYBRID,
    TOP,
    arms_of,
    name_of,
    scores_of,
    sections,
)
from fastkd.bench.page import charts_of
from fastkd.bench.quality_problem import Problem, cut, made_up, read_states
from fastkd.bench.quality_student import (
    Arm,
    Shape,
    Student,
    evaluate,
    loss,
    train,
)
from fastkd.bench.run import run_cases
from fastkd.bench.table import Table


@pytest.fixture(scope="module")
def problem() -> Problem:
    return made_up(windows=40, held=4, vocabulary=300, width=16)


class TestProblem:
    def test_states_are_those_of_the_layers_window_by_window(self) -> None:
        states = torch.randn(3, 4, 5, 8)  # layers, windows

        def model(ids: Any, **settings: Any) -> Any:
            assert settings["output_hidden_states"]
            return SimpleNamespace(hidden_states=[layer[ids[0, 0]][None] for layer in states])

        windows = torch.tensor([[3, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
        early, last = read_states(SimpleNamespace(model=model), windows, layer=1)
        assert torch.equal(last, torch.cat([states[2, 3], states[2, 1]]))
        torch.testing.assert_close(early, F.rms_norm(torch.cat([states[1, 3], states[1, 1]]), (8,)))

    def test_a_vocabulary_has_the_labels_and_the_most_likely(self) -> None:
        head, states = torch.eye(6), torch.tensor([[4.0, 3, 2, 1, 0, -9]] * 2)
        labels = torch.tensor([5, 0])
        kept, found, mass = cut(head, states, labels, 3)
        assert torch.equal(kept[found], head[labels])
        assert torch.equal(kept.sum(0), torch.tensor([1.0, 1, 0, 0, 0, 1]))
        assert mass == pytest.approx(float(states[0].softmax(0)[[0, 1, 5]].sum()))
        with pytest.raises(ValueError, match="vocabulary: got 1; expected at least 2"):
            cut(head, states, labels, 1)


class TestStudent:
    def test_it_begins_as_the_least_squares(self, problem: Problem) -> None:
        fit = problem.inputs_ND @ problem.fit_DD
        gain = problem.states_ND[: problem.trained].square().mean(0).sqrt()
        expected = F.rms_norm(fit / gain, (16,)) * gain
        for seed in (0, 1):
            torch.testing.assert_close(Student(problem, seed)(problem.inputs_ND), expected)

    def test_score_is_that_of_what_was_held_out(self, problem: Problem) -> None:
        class Teacher(torch.nn.Module):
            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                at = (problem.inputs_ND[None, :, 0] == inputs[:, None, 0]).int().argmax(1)
                assert (at >= problem.trained).all()
                return problem.states_ND[at]

        score = evaluate(problem, Teacher())
        held = slice(problem.trained, None)
        assert score.kl == pytest.approx(0.0, abs=1e-5)
        assert score.ce == pytest.approx(float(F.cross_entropy(problem.logits(held), problem.labels_N[held])), rel=1e-5)

    @pytest.mark.parametrize("t", [1.0, 2.0])
    def test_a_head_of_all_outcomes_is_the_live_teacher(self, problem: Problem, t: float) -> None:
        rows = torch.arange(40)
        hidden = problem.states_ND[rows] + torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
        found = []
        for arm in (Arm(t, "dense"), Arm(t, "bucket", Shape(300))):
            leaf = hidden.clone().requires_grad_()
            targets = arm.shape.targets(problem, 0) if arm.shape else None
            value = loss(problem, arm, targets, leaf, rows)
            value.backward()
            found.append((value.detach(), leaf.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)

    def test_draws_are_of_the_seed_and_of_the_position(self, problem: Problem) -> None:
        shape = Shape(4, 8)
        one, same, other = (shape.targets(problem, seed) for seed in (0, 0, 1))
        assert len(one) == problem.trained
        assert torch.equal(one.ids, same.ids)
        assert not torch.equal(one.ids, other.ids)
        assert torch.equal(one.ids[:, :4], other.ids[:, :4])


def test_what_is_learnt_from_shows(problem: Problem) -> None:
    """Hard labels teach less of the teacher than it does itself, and a head without its tail something else."""
    narrow = Shape(4)
    arms = [Arm(1.0, "labels"), Arm(1.0, "dense"), Arm(1.0, "sampled", Shape(4, 12)), Arm(1.0, "renormalize", narrow)]
    found = scores_of(problem, arms, seeds=2)
    begin = evaluate(problem, Student(problem, 0)).kl
    for labels, dense, sampled, renormalized in zip(*(found[arm] for arm in arms), strict=True):
        assert dense.kl < begin
        assert dense.kl < sampled.kl < renormalized.kl
        assert dense.kl < labels.kl
    one, other = (found[arms[1]][seed] for seed in (0, 1))
    assert one != other  # another order
    again = train(problem, arms[1], None, seed=0)
    assert evaluate(problem, again) == pytest.approx(one, rel=1e-4)


def test_rows_of_every_arm(problem: Problem) -> None:
    arms = [arm for arm in arms_of((1.0, 2.0), (1.0,), (1.0,)) if arm.shape != Shape(0, 256)]
    table = Table("cpu", "quality", size="small")
    run_cases(sections(lambda: problem, arms, seeds=2, rows=16, sets=2), table, lambda text: None)
    names = {(row.case.split(":")[0], row.name) for row in table.rows}
    for arm in arms:
        assert (f"students, T={arm.temperature:g}", f"{name_of(arm)}: KL") in names
    size = {row.name: row.value for row in table.rows if row.unit == "bytes"}
    assert set(size) == {"top 64", "64 draws at T_d = 1", "48 + 16 draws at T_d = 1"}
    assert all(value and 20 < value < 250 for value in size.values())
    assert any(row.name == "sampled, 0 + 64 from T_d = 1: cosine" for row in table.rows)
    (chart,) = charts_of(table.recording())
    assert {tuple(line.x) for line in chart.lines} == {(1.0, 2.0), (2.0,)}  # the head of 48 alone at T = 2


def test_auto_is_named() -> None:
    assert name_of(Arm(1.0, "sampled", HYBRID)) == "48 + 16 draws at T_d = 1, sampled (auto)"
    assert name_of(Arm(2.0, "sampled", HYBRID)) == "48 + 16 draws at T_d = 1, sampled"
    assert name_of(Arm(2.0, "bucket", HYBRID)).endswith("bucket (auto)")
    assert name_of(Arm(1.0, "bucket", TOP)) == "top 64, bucket"


def test_cosine_and_norm() -> None:
    truth = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    tally = treatments.Tally(truth)
    tally.add(2 * truth)
    tally.add(torch.tensor([[4.0, -3.0]], dtype=torch.float64))
    figures = tally.figures()
    assert figures["cosine"] == pytest.approx(0.5)
    assert figures["norm"] == pytest.approx(1.5)
