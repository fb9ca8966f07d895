"""Training with `match`: the losses of the whole chain against the stored states, divided steps, resuming, export."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_jobs
from hf_cases import model_of
from match_cases import add_feature
from safetensors.torch import load_file
from torch import Tensor, nn
from train_cases import CAPTURE, SMALL, WIDTH, Tiny, bits, documents, llama, make_cache

import fastkd
from fastkd import DistillLoader
from fastkd.cache import Cache, StoreError, open_cache
from fastkd.errors import StreamError, TrainError
from fastkd.models.attention import from_bytes
from fastkd.settings import TrainSettings
from fastkd.stream.batch import MicroBatch
from fastkd.sweep.arms import make_arms
from fastkd.train.auto_weight import SHARE, STEPS, AutoWeights
from fastkd.train.checkpoint import newest
from fastkd.train.matched import matched_objective
from fastkd.train.metrics import read_metrics
from fastkd.train.objective import AUTO, TokenKD, WeightedSum
from fastkd.train.objectives.attention import AttentionKD
from fastkd.train.objectives.hidden import HiddenKD
from fastkd.train.objectives.projector import LinearProjector
from fastkd.train.parallel import checkpoint_layers
from fastkd.train.student import Student, make_student
from fastkd.utils.signals import Stop

NARROW = 7  # of a teacher's states, where a student has WIDTH
DOUBLE = "train_cases:double"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("match")
    cache = make_cache(folder / "cache")
    add_feature(cache, "2")
    add_feature(cache, "-1", width=NARROW)
    add_feature(cache, "1", positions="0.5")
    return folder


@pytest.fixture(scope="module")
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


def train(cache: Any, out: Path, *match: str, student: Any = None, **changes: Any) -> fastkd.TrainReport:
    return fastkd.train(student or Tiny(seed=1), cache, out, **{**SMALL, **changes}, match=match)


def stored(cache: Cache) -> dict[tuple[int, ...], tuple[Any, Any]]:
    """The states of feature 2 and their scales as the cache has them, by the tokens of their segment."""
    found = {}
    for index in cache.shards:
        arrays, feature = cache.read_shard(index), cache.features["2"]
        codes = feature.read_codes(index)
        states = feature.read_shard(index).astype(np.float64)
        scale = codes["scale"].astype(np.float64)
        scale[codes["exact_rows"]] = np.sqrt(np.square(states[codes["exact_rows"]]).mean(1))
        ends = {int(e) for name in ("sequence_lengths", "document_lengths") for e in np.cumsum(arrays[name])}
        for a, b in pairwise(sorted({0} | ends)):
            found[tuple(arrays["tokens"][a:b].tolist())] = states[a:b], scale[a:b]
    return found


def segments(batch: MicroBatch) -> list[tuple[tuple[int, ...], list[int]]]:
    """The tokens of each segment, and their flattened positions."""
    bounds, length = batch.cu_seqlens.tolist(), batch.input_ids.shape[1]
    flat, found = batch.input_ids.flatten().tolist(), []
    for row, (a, b) in enumerate(pairwise(bounds)):
        begin = row * length if batch.layout == "padded" else a
        where = list(range(begin, begin + b - a))
        found.append((tuple(flat[i] for i in where), where))
    return found


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "smooth_l1"])
def test_the_loss_of_coordinates_is_that_of_the_states(cache: Cache, layout: str, loss: str) -> None:
    """Through reading, gathering, the student and its projector, against the states that `read_shard` returns."""
    states = stored(cache)
    student = make_student(llama(), cache.spec).student.double() if layout == "packed" else _double(cache)
    name = "state:2" if layout == "padded" else "state:1"
    width = student.inner_shapes([name])[name][2]
    projector = LinearProjector(width, WIDTH, dtype=torch.float64)
    student.read(WeightedSum({"hidden": HiddenKD("2", name, loss, projector=projector)}))
    step = next(iter(DistillLoader(cache, batch_size=5, micro_tokens=40, layout=layout, features=("2",))))
    basis = torch.from_numpy(cache.features["2"].basis.basis).double()
    shifted = total = 0.0
    for batch in step.micro_batches:
        ours = student(batch, num_items=step.count)["hidden"]
        with torch.no_grad():
            student.run(batch)
            assert student._inner is not None
            (hidden,) = student._inner.take().values()
            expected = _by_hand(batch, states, hidden, projector, basis, loss, 0) / step.positions
            after = _by_hand(batch, states, hidden, projector, basis, loss, 1) / step.positions
        assert float(ours) == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
        # a target of the position before would be noticed
        shifted += abs(float(after - expected))
        total += float(expected)
    assert shifted > 0.01 * total


def _double(cache: Cache) -> Student:
    return make_student(Tiny(seed=1, dtype=torch.float64), cache.spec).student


def _by_hand(
    batch: MicroBatch, states: Any, hidden: Tensor, projector: Any, basis: Tensor, loss: str, shift: int
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tokens, where in segments(batch):
        x, scale = (torch.from_numpy(np.roll(a, shift, 0)) for a in states[tokens])
        h = hidden.flatten(0, 1)[where].double()
        h = h / h.square().mean(1, keepdim=True).sqrt()
        ours, theirs = h @ projector.weight.T + projector.bias, x / scale[:, None]
        if loss == "smooth_l1":
            total += nn.functional.smooth_l1_loss(ours, theirs, reduction="none").mean(1).sum()
            continue
        ours = ours @ basis.T  # from the coordinates to the teacher's own components
        if loss == "mse":
            total += (ours - theirs).square().mean(1).sum()
        else:
            total += (1 - nn.functional.cosine_similarity(ours, theirs, dim=1)).sum()
    return total


def test_terms_and_their_weights(cache: Cache, tmp_path: Path) -> None:
    entries = ("2:2:mse:0.25", "-1:-1:cosine:0.5", "2:1:gram:1", "1:layers.0:mse:2")
    report = train(cache, tmp_path, *entries, match_rate=0.002)
    assert report.complete
    names = ["hidden/2:2:mse", "hidden/-1:3:cosine", "hidden/2:1:gram", "hidden/1:layers.0:mse"]
    for line in read_metrics(tmp_path):
        parts = sum(w * line[n] for w, n in zip((0.25, 0.5, 1, 2), names, strict=True))
        assert line["loss"] == pytest.approx(line["answers"] + parts, rel=1e-5)
        assert all(line[name] > 0 for name in names)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["weights"] == {"answers": 1.0, **dict(zip(names, (0.25, 0.5, 1, 2), strict=True))}
    assert run["settings"]["match"] == list(entries)


def test_a_student_is_exported_without_projectors(cache: Cache, tmp_path: Path) -> None:
    train(cache, tmp_path / "with", "-1:-1:mse:0.5", steps=2)
    train(cache, tmp_path / "without", steps=2)
    ours, theirs = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("with", "without"))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    runs = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("with", "without")]
    assert runs[0]["student"]["parameters"] == runs[1]["student"]["parameters"]
    checkpoint = newest(tmp_path / "with")
    assert checkpoint is not None
    assert [n for n in checkpoint.shapes("model") if "projector" in n]


def test_without_match_a_training_is_as_it_was(cache: Cache, tmp_path: Path) -> None:
    """The same bits as a sum of the one objective, which goes through all that is new; and the same fingerprint."""
    train(cache, tmp_path / "plain")
    fastkd.train(Tiny(seed=1), cache, tmp_path / "sum", **SMALL, objective=WeightedSum({"token": TokenKD()}))
    assert bits(tmp_path / "plain", 10) == bits(tmp_path / "sum", 10)
    checkpoint = newest(tmp_path / "plain")
    assert checkpoint is not None
    assert not [name for name in checkpoint.state["settings"] if "match" in name or name == "objective"]
    assert "weights" not in checkpoint.state


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"])
def test_divided_steps(place: Path, tmp_path: Path, kind: str) -> None:
    """Micro-batches and processes, by DDP and FSDP2: the same weights and projectors, since counts are those of whole
    steps. One entry has its weight from the norms of gradients."""
    match = {"match": ("2:2:mse:0.5", "-1:3:cosine:auto", "1:1:mse:0.1")}
    common = SMALL | match
    train_jobs.train(DOUBLE, place / "cache", tmp_path / "one", common | {"micro_tokens": 1000})
    train_jobs.train(DOUBLE, place / "cache", tmp_path / "parts", common | {"micro_tokens": 16})
    two = (DOUBLE, place / "cache", tmp_path / "two", common | {"parallel": kind})
    train_jobs.run(train_jobs.train, *two, ranks=2)
    expected = _tensors(tmp_path / "one")
    assert sum("projector" in name for name in expected) == 6
    for run in ("parts", "two"):
        found = _tensors(tmp_path / run)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-7, msg=f"{run}: {name}")
        weights = [json.loads((tmp_path / r / "run.json").read_text())["weights"] for r in ("one", run)]
        assert weights[1] == pytest.approx(weights[0], rel=1e-7)


def _tensors(run: Path) -> dict[str, Tensor]:
    checkpoint = newest(run)
    assert checkpoint is not None
    return checkpoint.tensors("model")


def test_resumed_at_any_step_to_the_same_bits(cache: Cache, tmp_path: Path) -> None:
    """While the weight of auto is being found, and after it stays."""
    match = ("2:2:mse:auto", "-1:-1:cosine:0.5")
    options: dict[str, Any] = {"steps": STEPS + 2, "checkpoint_every": 3, "keep": 9}
    student = Tiny(seed=1, dropout=0.1)
    train(cache, tmp_path / "whole", *match, student=student, **options)
    stop = Stop()
    stop()
    count = 0
    while train(cache, tmp_path / "parts", *match, student=student, stop=stop, **options).status == 75:
        count += 1
    assert count == STEPS + 1
    for step in (3, 6, 9, 10):
        assert bits(tmp_path / "parts", step) == bits(tmp_path / "whole", step)
    name = "weight/hidden/2:2:mse"
    ours, theirs = ([line[name] for line in read_metrics(tmp_path / run)] for run in ("parts", "whole"))
    assert ours == theirs
    assert len(set(ours[:STEPS])) > 1
    assert len(set(ours[STEPS - 1 :])) == 1
    runs = [json.loads((tmp_path / run / "run.json").read_text())["weights"] for run in ("parts", "whole")]
    assert runs[0] == runs[1]
    assert runs[0]["hidden/2:2:mse"] == ours[-1]
    with pytest.raises(TrainError, match=r"match: \['2:2:mse:auto'.*\] there, \['2:2:mse:0.1'\] here"):
        train(cache, tmp_path / "parts", "2:2:mse:0.1", student=student, **options)


def test_an_automatic_weight_is_a_ratio_of_gradients(cache: Cache, tmp_path: Path) -> None:
    """In the first step, by hand: of the token loss and of the term, in all parameters of the student."""
    options: dict[str, Any] = {"steps": 1, "batch_size": 4, "micro_tokens": 1000, "match_init": "random"}
    report = train(cache, tmp_path, "2:2:mse:auto", **options)
    weight = read_metrics(report_path := tmp_path)[0]["weight/hidden/2:2:mse"]
    assert report_path
    student = make_student(Tiny(seed=1), cache.spec, TrainSettings()).student
    settings = TrainSettings(match=("2:2:mse:auto",))
    objective = matched_objective(settings, [cache], student)
    assert objective.auto == ("hidden/2:2:mse",)
    student.read(objective)
    step = next(iter(DistillLoader(cache, batch_size=4, micro_tokens=1000, features=("2",))))
    norms = []
    for alone in ({"answers": 1.0, "hidden/2:2:mse": 0.0}, {"answers": 0.0, "hidden/2:2:mse": 1.0}):
        objective.weights = alone
        for batch in step.micro_batches:
            student(batch, num_items=step.count, **_scalars(objective))["loss"].backward()
        norms.append(torch.stack([p.grad.norm() for p in student.model.parameters() if p.grad is not None]).norm())
        student.zero_grad()
    assert report.complete
    assert weight == pytest.approx(float(SHARE * norms[0] / norms[1]), rel=1e-4)


def test_steps_without_a_gradient_have_no_say_in_an_automatic_weight() -> None:
    """As where few positions are stored, and a batch may have none of them."""
    objective = WeightedSum({"answers": TokenKD(), "other": TokenKD()}, {"other": AUTO})
    auto, norms = AutoWeights(objective), iter([2.0, 0.0, 2.0, 0.5, 2.0, 0.0, 2.0, 0.0])
    weights = []
    for _ in range(4):
        auto.measure(lambda: next(norms))
        weights.append(objective.weights["other"])
    assert weights == [0.0, 4.0 * SHARE, 4.0 * SHARE, 4.0 * SHARE]
    assert auto.state_dict() == {"ratios": {"other": [0.0, 4.0, 0.0, 0.0]}}


def _scalars(objective: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in objective.schedule(0, 1).items()}


def test_projectors_are_made_by_the_seed_and_have_their_own_rate(cache: Cache, tmp_path: Path) -> None:
    student = make_student(Tiny(seed=1), cache.spec).student

    def made(seed: int) -> Any:
        settings = TrainSettings(match=("2:2:mse:1", "2:1:mse:1"), seed=seed)
        return {n: p.detach() for n, p in matched_objective(settings, [cache], student).named_parameters()}

    first, again, other = made(0), made(0), made(1)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert name.endswith("bias") or not torch.equal(weight, other[name])
    assert not torch.equal(*[w for n, w in first.items() if n.endswith("weight")])
    train(cache, tmp_path, "2:2:mse:1", steps=1, match_rate=0.0, match_init="random")
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    trained = [t for n, t in checkpoint.tensors("model").items() if n.endswith("projector.weight")]
    assert torch.equal(trained[0], next(w for n, w in first.items() if "2:2:mse" in n and n.endswith("weight")))


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_a_projector_begins_with_the_best_fit(cache: Cache, tmp_path: Path, loss: str) -> None:
    """Of the first batch, however it is divided; by numpy's least squares, with a ridge for the weights."""
    options: dict[str, Any] = {"steps": 1, "batch_size": 20, "rate": 0.0, "match_rate": 0.0}
    train(cache, tmp_path / loss, f"2:2:{loss}:1", student=Tiny(seed=1, dropout=0.3), micro_tokens=30, **options)
    student = _double(cache)
    student.read(HiddenKD("2", "state:2", "gram"))
    (batch,) = next(iter(DistillLoader(cache, batch_size=20, micro_tokens=None, features=("2",)))).micro_batches
    with torch.no_grad():
        student.run(batch)
        assert student._inner is not None
        targets = batch.features["2"]
        x = student._inner.take()["state:2"].flatten(0, 1)[targets.index]
    x = torch.nn.functional.pad(x / x.square().mean(1, keepdim=True).sqrt(), (0, 1), value=1.0).numpy()
    z = (targets.coordinates() if loss == "mse" else targets.units()).double().numpy()
    ridge = np.diag([(0.01 * len(x)) ** 0.5] * WIDTH + [0.0])
    expected = np.linalg.lstsq(
        np.concatenate([x, ridge]), np.concatenate([z, np.zeros((WIDTH + 1, WIDTH))]), rcond=None
    )[0]
    found = _tensors(tmp_path / loss)
    weight, bias = (next(t for n, t in found.items() if n.endswith(f"projector.{part}")) for part in ("weight", "bias"))
    np.testing.assert_allclose(weight.numpy(), expected[:-1].T, atol=1e-4)
    np.testing.assert_allclose(bias.numpy(), expected[-1], atol=1e-4)


def test_without_a_projector(cache: Cache, tmp_path: Path) -> None:
    """Equal widths: the student's states in the teacher's coordinates, with no parameter."""
    train(cache, tmp_path, "2:2:mse:0.5", "-1:-1:gram:1", match_projector="identity", steps=2)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert not [name for name in checkpoint.shapes("model") if "projector" in name]
    with pytest.raises(
        TrainError, match=r"match: got '-1:3:mse:0.5'; .* has 12 components and the teacher's 7; .*'linear'"
    ):
        train(cache, tmp_path / "other", "-1:-1:mse:0.5", match_projector="identity")


def test_inner_states_of_a_model_of_transformers(cache: Cache, tmp_path: Path) -> None:
    """Padded, packed, with activation checkpointing: the same training."""
    runs = {"plain": {}, "packed": {"layout": "packed"}, "less": {"activation_checkpointing": True}}
    for name, changes in runs.items():
        # a large eps: Adam would turn the rounding of gradients near 0 into whole steps
        train(
            cache, tmp_path / name, "2:1:mse:0.5", "-1:-1:cosine:1", student=llama(), steps=3, adam_eps=0.01, **changes
        )
    expected = _tensors(tmp_path / "plain")
    for name in ("packed", "less"):
        for key, tensor in _tensors(tmp_path / name).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch as it compiles
@pytest.mark.soak
def test_inner_states_of_compiled_layers(cache: Cache, tmp_path: Path) -> None:
    for name in ("plain", "compile"):
        student = Tiny(seed=1, dtype=torch.float64)
        match = ("2:1:mse:0.5", "-1:-1:cosine:1")
        train(cache, tmp_path / name, *match, student=student, steps=3, compile=name == "compile")
    expected = _tensors(tmp_path / "plain")
    for key, tensor in _tensors(tmp_path / "compile").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.fixture(scope="module")
def attentive(place: Path) -> Path:
    """A cache of a teacher with attention, with a state and its layer's block."""
    made = {"features": ("1",), "feature_block": True, "feature_step": 0.02}
    fastkd.capture(
        model_of("llama", seed=3, initializer_range=0.2), documents(), place / "attentive", **CAPTURE, **made
    )
    return place / "attentive"


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_attention_of_a_copy_of_the_teacher_is_the_teachers(attentive: Path, layout: str) -> None:
    """From the coded state and the block, across layouts and segments; and not if positions are shifted by one."""
    cache = open_cache(attentive)
    student = make_student(model_of("llama", seed=3, initializer_range=0.2), cache.spec).student
    settings = TrainSettings(match=("1:1:attention:1", "1:1:relation:1"))
    objective = matched_objective(settings, [cache], student)
    assert list(objective.terms) == ["answers", "attention/1:1:attention", "relation/1:1:relation"]
    student.read(objective)
    names, right, wrong = list(objective.terms)[1:], np.zeros(2), np.zeros(2)
    for step in DistillLoader(cache, batch_size=6, micro_tokens=50, layout=layout, features=("1",)):
        for batch in step.micro_batches:
            targets = batch.features["1"]
            shifted = replace(targets.take(torch.roll(torch.arange(len(targets)), 1)), index=targets.index)
            for sums, signals in ((right, batch.signals), (wrong, {"features/1": shifted})):
                with torch.no_grad():
                    given = replace(batch, signals=signals)
                    found = student(given, num_items=step.count, **_scalars(objective))
                sums += [float(found[name]) for name in names]
    assert (right < 1e-3 * wrong).all(), (right, wrong)


def test_gradients_of_attention(attentive: Path) -> None:
    """They reach the queries and keys of the layer, and what lies below; the same through activation checkpointing."""
    cache = open_cache(attentive)
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        student = make_student(llama(), cache.spec).student.train()
        objective = matched_objective(TrainSettings(match=("1:1:attention:1",)), [cache], student)
        objective.weights = {"answers": 0.0, "attention/1:1:attention": 1.0}
        student.read(objective)
        if checkpointing:
            checkpoint_layers(student)
        step = next(iter(DistillLoader(cache, batch_size=6, features=("1",))))
        for batch in step.micro_batches:
            student(batch, num_items=step.count, **_scalars(objective))["loss"].backward()
        gradients = {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None and p.grad.any()}
        found.append(gradients)
    names = {name for name in found[0] if "layers.1." in name}
    assert names == {
        f"model.layers.1.{name}.weight" for name in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")
    }
    assert "model.layers.0.self_attn.v_proj.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    with pytest.raises(TrainError, match=r"match: got '1:5:attention:1'; .*expected a number from 0 to 1"):
        matched_objective(TrainSettings(match=("1:5:attention:1",)), [cache], student)


def test_refusals_of_attention(attentive: Path, tmp_path: Path) -> None:
    cache = open_cache(attentive)
    with pytest.raises(TrainError, match=r"layer 1 of Tiny: got no model of transformers"):
        train(cache, tmp_path / "run", "1:1:attention:1")
    objective = AttentionKD("1", "attention:7", from_bytes(cache.features["1"].block or b""))
    with pytest.raises(TrainError, match=r"attention:7: got a layer that LlamaForCausalLM lacks; it has 2, from 0 on"):
        make_student(llama(), cache.spec).student.read(objective)
    sliding = make_student(model_of("gemma2"), cache.spec).student
    with pytest.raises(TrainError, match=r"layer 0 of Gemma2.*: it attends to the last 4 positions only"):
        sliding.read(AttentionKD("1", "attention:0", from_bytes(cache.features["1"].block or b"")))
    assert sliding.context is None


def test_named_features_take_no_listing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a cache behind a web server."""
    monkeypatch.setattr(type(cache.store), "list", None)
    student = make_student(Tiny(seed=1), cache.spec).student
    objective = matched_objective(TrainSettings(match=("3:3:cosine:1", "2:2:mse:1")), [cache], student)
    assert list(objective.terms)[1:] == ["hidden/-1:3:cosine", "hidden/2:2:mse"]

    def no_listing(self: Any, prefix: str) -> Any:
        raise StoreError("HTTP has no listing.")

    monkeypatch.setattr(type(cache.store), "list", no_listing)
    for match in ("auto", "7:2:mse:1"):
        with pytest.raises(TrainError, match=rf"match: got {match}, .* cannot be listed; expected entries that name"):
            matched_objective(TrainSettings(match=(match,)), [cache], student)
    with pytest.raises(StreamError, match=r"features: got '7', and .* has others\. Run its capture again"):
        DistillLoader(cache, batch_size=4, features=("7",))


def test_a_module_that_has_no_state_of_each_token_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"rotary_emb is \[1, 5, \d+\] for \[2, 5\] tokens; expected a state of each"):
        train(cache, tmp_path / "run", "2:model.rotary_emb:mse:1", student=llama())
    assert not (tmp_path / "run").exists()


def test_auto_and_a_sweep(cache: Cache, tmp_path: Path) -> None:
    report = train(cache, tmp_path, "auto", steps=1, student=Tiny(seed=1))
    assert any(note.startswith("match auto") for note in report.notes)
    weights = json.loads((tmp_path / "run.json").read_text())["weights"]
    assert list(weights) == ["answers", "hidden/1:1:mse", "hidden/2:2:mse", "hidden/-1:3:mse"]
    settings = TrainSettings(match=("2:2:mse:0.1",))
    arms, _ = make_arms({"alpha": [0.0, 1.0]}, settings, cache.spec)
    assert all(arm.of(settings, 0).match == ("2:2:mse:0.1",) for arm in arms)


@pytest.mark.parametrize(
    ("match", "problem"),
    [
        ("2:2:mse", r"match: got '2:2:mse'; expected TEACHER:STUDENT:LOSS:WEIGHT"),
        ("7:2:mse:1", r"match: got '7:2:mse:1'; expected a feature of the cache, which has 1, 2, -1"),
        ("2:9:mse:1", r"match: got '2:9:mse:1'; .* has 3 layers; expected a number from 0 to 3"),
        ("2:nowhere:mse:1", r"match: got '2:nowhere:mse:1'; expected a layer's number, or the name of a module"),
        ("2:2:mes:1", r"match: got '2:2:mes:1'; expected a loss of .*mse"),
        ("2:2:mse:-1", r"match: got '2:2:mse:-1'; expected a weight above 0, or auto"),
        ("2:2:hint:1", r"match: got '2:2:hint:1'; feature 2 is of states; expected one of maps, or a loss of states"),
        ("2:2:attention:1", r"match: got '2:2:attention:1', and feature 2 comes without the weights"),
    ],
)
def test_refused_before_anything_is_written(cache: Cache, tmp_path: Path, match: str, problem: str) -> None:
    with pytest.raises(TrainError, match=problem):
        train(cache, tmp_path / "run", match)
    assert not list(tmp_path.rglob("checkpoints"))


def test_more_refusals(cache: Cache, tmp_path: Path) -> None:
    bare = make_cache(tmp_path / "bare")
    with pytest.raises(TrainError, match=r"match: got 2:2:mse:1, and the cache has no features\. Add them"):
        train(bare, tmp_path / "run", "2:2:mse:1")
    with pytest.raises(TrainError, match=r"match: got 2:2:mse:1, and a batch source; expected a cache"):
        train(DistillLoader(cache, batch_size=4), tmp_path / "run", "2:2:mse:1")
    add_feature(bare, leave_out=(1,))
    with pytest.raises(StreamError, match=r"features: 1 of the .* shards of '2' in .* is missing \(the first is 1\)"):
        train(open_cache(bare.store), tmp_path / "run", "2:2:mse:1")
    with pytest.raises(TrainError, match=r"WeightedSum: got the weight 'auto' for the first term; expected a number"):
        WeightedSum({"token": TokenKD()}, {"token": AUTO})
    source = DistillLoader(cache, batch_size=4)
    options = SMALL | {"objective": HiddenKD("2", "state:2", "gram")}
    with pytest.raises(
        TrainError, match=r"HiddenKD needs the signal 'features/2', which the source's MicroBatch lacks"
    ):
        fastkd.train(Tiny(seed=1), source, tmp_path / "source", **options)
    with pytest.raises(TrainError, match="match_rate: got -1"):
        train(cache, tmp_path / "run", "2:2:mse:1", match_rate=-1)
