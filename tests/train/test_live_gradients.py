"""Gradients of the live modes against the dense losses of their papers, in float64, written out.

With k the whole vocabulary nothing is cut off a target, and what differs is that targets are stored in float32.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import VOCAB
from torch import Tensor
from train_cases import Tiny, make_cache

from fastkd.capture.mix import mix_rows
from fastkd.kernels import SparseTargets, TopKConfig, topk_targets
from fastkd.settings import CaptureSettings, TrainSettings
from fastkd.stream.batch import MicroBatch
from fastkd.stream.rows import NUMBERS, RowNumbers
from fastkd.train.ema import AveragedTeacher
from fastkd.train.exchange import Exchange, everyone
from fastkd.train.inputs import make_source
from fastkd.train.objective import TokenKD
from fastkd.train.peers import Peers
from fastkd.train.student import LoadedStudent, of_module

ALPHA, T, GRID = 0.3, 2.0, (1.0, 2.0)
SETTINGS = TrainSettings(alpha=ALPHA, temperature=T)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> MicroBatch:
    source = make_source(make_cache(tmp_path_factory.mktemp("gradients") / "cache"), TrainSettings(batch_tokens=200))
    found: MicroBatch = next(iter(source)).micro_batches[0]
    source.close()
    return replace(found, signals={NUMBERS: RowNumbers(torch.arange(found.count))})


def model(seed: int) -> Tiny:
    return Tiny(seed=seed, dtype=torch.float64)


def logits(of: Tiny, batch: MicroBatch) -> Tensor:
    found = of(batch.input_ids)
    z: Tensor = (found.states @ found.lm_head.weight.T).flatten(0, 1)
    return z[batch.targets.index]


def dense(of: Tiny, batch: MicroBatch, teachers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of alpha CE + (1 - alpha) T^2 KL(teacher, student), a mean over positions and over teachers, given as
    log-probabilities `[m, V]` at T = 1."""
    z = logits(of, batch)
    labels = batch.labels.flatten()[batch.targets.index]
    hard = torch.nn.functional.cross_entropy(z, labels)
    p = (z / T).log_softmax(1)
    each = []
    for log_q in teachers:
        q = (log_q.detach() / T).log_softmax(1)
        each.append((q.exp() * (q - p)).sum(1).mean())
    of.zero_grad()
    (ALPHA * hard + (1 - ALPHA) * T * T * torch.stack(each).mean()).backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: dict[str, Tensor]) -> None:
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-3, "of something"
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("as_logits", [False, True])
def test_students_that_learn_from_each_other(batch: MicroBatch, as_logits: bool) -> None:
    """Zhang et al. 2018, equations 4 to 8: of three, each from the mean over the two others, which get no gradient."""
    made = {}
    for seed, name in enumerate("abc"):
        module = Tiny(seed=seed, dtype=torch.float64, logits=as_logits and name == "b")
        made[name] = LoadedStudent(of_module(module, name), None)
    peers = Peers(made, Exchange(everyone(list("abc")), TopKConfig(k=VOCAB, temperatures=GRID)))
    peers.read(TokenKD.from_settings(SETTINGS))
    peers(batch, num_items=batch.count)["loss"].backward()
    said = {name: logits(model(seed), batch).detach() for seed, name in enumerate("abc")}
    for seed, name in enumerate("abc"):
        others = [z.log_softmax(1) for other, z in said.items() if other != name]
        assert_same(made[name].student.model, dense(model(seed), batch, others))


def test_a_mean_teacher(batch: MicroBatch) -> None:
    """Tarvainen & Valpola 2017: the average of weights over steps, and the student's gradient from what it says."""
    student = of_module(model(0), "student")
    student.live = AveragedTeacher(
        student, CaptureSettings(k=VOCAB, draws=0, temperatures=GRID), decay=0.9, warmup=False
    )
    student.read(TokenKD.from_settings(SETTINGS))
    average = model(0)
    for step in (1, 2, 3):
        with torch.no_grad():
            for p in student.model.parameters():
                p += 0.1 * step * p.sin()
        student.live.after_step(student, step)
        with torch.no_grad():
            for a, p in zip(average.parameters(), student.model.parameters(), strict=True):
                a.copy_(0.9 * a + 0.1 * p)
    student(batch, num_items=batch.count)["loss"].backward()
    plain = model(5)
    plain.load_state_dict(student.model.state_dict())
    assert_same(student.model, dense(plain, batch, [logits(average, batch).log_softmax(1)]))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_the_mean_of_teachers(batch: MicroBatch, weights: tuple[float, float]) -> None:
    """Of probabilities (fastkd mix-targets), not of logits; a temperature is of the mean."""
    said = [logits(model(seed), batch).detach() for seed in (7, 8)]
    parts = [topk_targets(z.float(), VOCAB, temperatures=GRID).arrays() for z in said]
    mixed = mix_rows(
        parts, weights, vocab_size=VOCAB, temperatures=GRID, draw_temperature=1.0, k=VOCAB, draws=0,
        uniform_N=np.zeros(batch.count),
    )  # fmt: skip
    targets = SparseTargets.from_arrays(mixed, vocab_size=VOCAB, temperatures=GRID)
    student = of_module(model(0), "student")
    student.read(TokenKD.from_settings(SETTINGS))
    given = replace(batch, targets=replace(targets, index=batch.targets.index))
    student(given, num_items=batch.count)["loss"].backward()
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean = sum(s * z.softmax(1) for s, z in zip(share, said, strict=True))
    assert_same(student.model, dense(model(0), batch, [mean.log()]))  # type: ignore[union-attr]
