"""Bad input: one error class that names the argument, what was found and what would be right."""

import math

import pytest
import torch
from cases import case, sparse

from fastkd import KDError, SparseTargets, kd_loss, linear_kd_loss, set_debug

C = case("plain", 6, 50, 4, 3)


def changed(**fields) -> SparseTargets:
    return SparseTargets(**{**vars(C.targets), **fields})


def with_value(name: str, row: int, column: int, value) -> SparseTargets:
    tensor = getattr(C.targets, name).clone()
    tensor[row, column] = value
    return changed(**{name: tensor})


SETTINGS = [
    ({"alpha": -0.1}, "alpha: found -0.1"),
    ({"alpha": 1.5}, "alpha: found 1.5"),
    ({"alpha": math.nan}, "alpha: found nan"),
    ({"alpha": torch.tensor([0.5])}, "alpha: found a tensor"),
    ({"alpha": torch.tensor(2.0)}, "alpha: found 2.0"),
    ({"temperature": 0.0}, "temperature: found 0.0"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": 0.5}, "below the lowest stored one"),
    ({"temperature": torch.tensor(0.5)}, "below the lowest stored one"),
    ({"divergence": "kl"}, "divergence: found 'kl'; one of forward_kl"),
    ({"treatment": "drop"}, "treatment: found 'drop'"),
    ({"treatment": "sampled", "divergence": "jsd"}, "treatment: found 'sampled' with divergence 'jsd'"),
    ({"treatment": "renormalize", "divergence": "reverse_kl"}, "which needs the teacher's probability"),
    ({"beta": 0.0}, "beta: found 0.0"),
    ({"skew": 1.0}, "skew: found 1.0"),
    ({"impl": "cuda"}, "impl: found 'cuda'"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, "mask: found shape"),
    ({"mask": torch.ones(6)}, "mask: found torch.float32"),
    ({"weights": torch.ones(7)}, "weights: found shape"),
    ({"weights": torch.ones(6, dtype=torch.int64)}, "weights: found torch.int64"),
    ({"weights": torch.full((6,), math.nan)}, "weights: row 0"),
    ({"num_items": -3}, "num_items: found -3"),
    ({"num_items": 4.0}, "num_items: found 4.0"),
    ({"num_items": torch.tensor([3])}, "num_items"),
    ({"num_items": torch.tensor(-2)}, "num_items"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS)
def test_settings(settings: dict, says: str) -> None:
    weight = torch.randn(50, 4)
    with pytest.raises(KDError, match=says):
        kd_loss(C.logits, C.targets, C.labels, **settings)
    with pytest.raises(KDError, match=says):
        linear_kd_loss(torch.randn(6, 4), weight, C.targets, C.labels, **settings)


VALUES = [
    ({"targets": with_value("ids", 3, 1, 50)}, "targets.ids: row 3"),
    ({"targets": with_value("ids", 3, 1, -1)}, "targets.ids: row 3"),
    ({"targets": with_value("ids", 2, 1, int(C.targets.ids[2, 0]))}, "targets.ids: row 2 .*at most once"),
    ({"targets": with_value("logprobs", 4, 0, math.nan)}, "targets.logprobs: row 4"),
    ({"targets": with_value("tail", 1, 2, math.nan)}, "targets.tail: row 1"),
    ({"labels": torch.tensor([0, 1, 50, 3, 4, 5])}, "labels: row 2 has .50."),
    ({"labels": torch.tensor([0, 1, -5, 3, 4, 5])}, "labels: row 2"),
    ({"targets": changed(index=torch.tensor([0, 1, 2, 3, 4, 9]))}, "targets.index: row 5"),
    ({"targets": changed(index=torch.tensor([0, 1, 2, 3, 4, 4]))}, "targets.index: row 4 .*at most once"),
]


@pytest.mark.parametrize(("change", "says"), VALUES)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_values_on_the_cpu(change: dict, says: str, impl: str) -> None:
    with pytest.raises(KDError, match=says):
        kd_loss(C.logits, **{"targets": C.targets, "labels": C.labels, "impl": impl, **change})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    logits = C.logits.clone()
    logits[4, 17] = value
    with pytest.raises(KDError, match=r"logits: row .* NaN or infinite"):
        kd_loss(logits, C.targets, C.labels)


def test_shapes() -> None:
    with pytest.raises(KDError, match="narrower than"):
        kd_loss(C.logits[:, :49], C.targets, C.labels)
    with pytest.raises(KDError, match="targets: found 6 rows"):
        kd_loss(C.logits[:4], C.targets, C.labels[:4])
    with pytest.raises(KDError, match="labels: found shape"):
        kd_loss(C.logits, C.targets, C.labels[:4])
    with pytest.raises(KDError, match=r"labels: found torch\.float32"):
        kd_loss(C.logits, C.targets, C.labels.float())
    with pytest.raises(KDError, match=r"logits: found .*int64"):
        kd_loss(C.logits.long(), C.targets, C.labels)
    with pytest.raises(KDError, match="logits"):
        kd_loss(C.logits[0], C.targets, C.labels)
    hidden, weight = torch.randn(6, 4), torch.randn(50, 4)
    for change, says in [
        ({"weight": torch.randn(50, 5)}, "weight: found shape"),
        ({"weight": weight.double()}, "weight: found torch.float64"),
        ({"bias": torch.randn(49)}, "bias: found"),
        ({"softcap": 0.0}, "softcap: found 0.0"),
        ({"logit_scale": -1.0}, "logit_scale: found -1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens: found 0"),
        ({"grad_weight": torch.zeros(50, 4, dtype=torch.float64)}, "grad_weight: found"),
    ]:
        with pytest.raises(KDError, match=says):
            linear_kd_loss(**{"hidden": hidden, "weight": weight, "targets": C.targets, "labels": C.labels, **change})


def test_draws_alone_are_refused_by_what_needs_a_head() -> None:
    targets = sparse(torch.randn(6, 50), 0, 5)
    kd_loss(C.logits, targets, C.labels)
    for treatment in ("bucket", "renormalize"):
        with pytest.raises(KDError, match="draws and no exact head"):
            kd_loss(C.logits, targets, C.labels, treatment=treatment)
    with pytest.raises(KDError, match="draws and no exact head"):
        kd_loss(C.logits, targets, C.labels, temperature=4.0)


def test_too_small_a_grid_is_refused_off_it() -> None:
    targets = sparse(torch.randn(6, 50), 4, grid=(1.0, 2.0))
    kd_loss(C.logits, targets, C.labels, temperature=2.0)
    for t in (1.5, torch.tensor(1.5)):
        with pytest.raises(KDError, match="at least 3 stored temperatures"):
            kd_loss(C.logits, targets, C.labels, temperature=t)


def test_triton_on_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KDError, match="impl: found 'triton' with a tensor on cpu"):
        kd_loss(C.logits, C.targets, C.labels, impl="triton")


def on_device_values(device: str) -> None:
    """Unchecked: a bad row's loss and gradient are NaN, all others are as they were; nothing is out of bounds."""
    good = torch.arange(6)
    for change, row in [
        ({"targets": with_value("ids", 3, 1, 51)}, 3),
        ({"targets": with_value("ids", 3, 1, -7)}, 3),
        ({"targets": with_value("ids", 3, 1, 2**30)}, 3),
        ({"targets": with_value("logprobs", 4, 0, math.nan)}, 4),
        ({"labels": torch.tensor([0, 1, 2, 3, 10**9, 5])}, 4),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, -3])}, 5),
    ]:
        targets, labels = change.get("targets", C.targets), change.get("labels", torch.arange(6))
        logits = C.logits.detach().clone().to(device).requires_grad_()
        out = kd_loss(
            logits, targets.to(device), labels.to(device), impl="triton", temperature=2.0, treatment="sampled"
        )
        out.loss.backward()
        assert math.isnan(float(out.loss.detach()))
        bad = logits.grad.isnan().any(1).cpu()
        assert bad.nonzero()[:, 0].tolist() == [row]
        clean = C.logits.detach().clone().to(device).requires_grad_()
        kd_loss(
            clean, C.targets.to(device), good.to(device), impl="triton", temperature=2.0, treatment="sampled"
        ).loss.backward()
        others = good != row
        assert torch.equal(logits.grad.cpu()[others], clean.grad.cpu()[others])
    for settings in (
        {"alpha": torch.tensor(1.5, device=device)},
        {"temperature": torch.tensor(0.3, device=device)},
        {"temperature": torch.tensor(-1.0, device=device)},
        {"treatment": "bucket", "targets": sparse(torch.randn(6, 50), 0, 5).to(device)},
    ):
        given = {"targets": C.targets.to(device), **settings}
        out = kd_loss(C.logits.to(device), labels=good.to(device), impl="triton", **given)
        assert math.isnan(float(out.loss))
    outside = changed(index=torch.tensor([0, 1, 2, 3, 4, 77])).to(device)
    assert math.isnan(float(kd_loss(C.logits.to(device), outside, good.to(device), impl="triton").loss))


def test_unchecked_values_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, where values are not looked at: the kernels alone keep to their bounds."""
    from fastkd.kernels import loss_triton

    if torch.cuda.is_available():
        pytest.skip("compiled here")
    monkeypatch.setattr(loss_triton, "values_are_checked", lambda device: False)
    on_device_values("cpu")


@pytest.mark.gpu
def test_unchecked_values_on_the_gpu() -> None:
    on_device_values("cuda")


@pytest.mark.gpu
def test_debug_names_row_and_argument_on_the_gpu() -> None:
    set_debug(True)
    try:
        with pytest.raises(KDError, match=r"targets\.ids: row 3"):
            kd_loss(C.logits.cuda(), with_value("ids", 3, 1, 50).to("cuda"), C.labels.cuda())
    finally:
        set_debug(False)
