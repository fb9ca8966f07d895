"""LossConfig: one object, or keyword arguments, and the same loss; the LM head as one object; treatments."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from cases import case

from fastkd import DistillationLoss, KDError, LMHead, LossConfig, kd_loss, linear_kd_loss
from fastkd.kernels import resolve_treatment
from fastkd.kernels.loss.config import LossSettings

C = case("plain", 6, 50, 4, 3)
CONFIG = LossConfig(alpha=0.2, temperature=2.0, divergence="jsd", beta=0.3, ignore_index=-7)
HIDDEN, WEIGHT = torch.randn(6, 4), torch.randn(50, 4)


def test_keyword_arguments_are_the_fields() -> None:
    assert [f.name for f in fields(LossConfig)] == list(LossSettings.__annotations__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tempreature'"):
        kd_loss(C.logits, C.targets, C.labels, tempreature=2.0)


def test_config_and_keyword_arguments_are_the_same_loss() -> None:
    keywords = {f.name: getattr(CONFIG, f.name) for f in fields(CONFIG)}
    labels = C.labels.where(C.labels != -100, -7)
    for loss in (
        lambda **settings: kd_loss(C.logits, C.targets, labels, **settings),
        lambda **settings: linear_kd_loss(HIDDEN, WEIGHT, C.targets, labels, **settings),
        lambda **settings: DistillationLoss(**settings)(C.logits, C.targets, labels),
        lambda **settings: DistillationLoss(**settings).linear(HIDDEN, WEIGHT, C.targets, labels),
    ):
        expected = loss(config=CONFIG).loss
        assert torch.equal(loss(**keywords).loss, expected)
        changed = loss(config=CONFIG, beta=0.6).loss
        assert torch.equal(changed, loss(config=replace(CONFIG, beta=0.6)).loss)
        assert not torch.equal(changed, expected)
    with pytest.raises(KDError, match="config: got dict; expected a LossConfig"):
        kd_loss(C.logits, C.targets, C.labels, config={"alpha": 0.5})


def test_a_config_is_constant_and_checks_itself() -> None:
    with pytest.raises(FrozenInstanceError):
        CONFIG.alpha = 0.5
    for settings in ({"alpha": 2.0}, {"temperature": 0.0}, {"divergence": "x"}, {"skew": 1.0}, {"impl": "x"}):
        with pytest.raises(KDError, match=f"{next(iter(settings))}: got"):
            LossConfig(**settings)
    assert LossConfig(ignore_index=np.int32(-7)) == LossConfig(ignore_index=-7)
    assert (CONFIG.parameter, replace(CONFIG, divergence="skew_kl").parameter) == (0.3, 0.1)


def test_the_modules_attributes_are_its_configs_fields() -> None:
    module = DistillationLoss(temperature=2.0)
    module.alpha = torch.tensor(0.25)
    assert module.config == LossConfig(alpha=module.alpha, temperature=2.0)
    assert (module.temperature, module.divergence) == (2.0, "forward_kl")
    assert "temperature=2.0" in repr(module)
    with pytest.raises(KDError, match="temperature: got -1"):
        module.temperature = -1.0
    with pytest.raises(AttributeError):
        _ = module.tempreature


def test_an_lm_head_stands_for_weight_bias_softcap_and_scale() -> None:
    parts = {"bias": torch.randn(50), "softcap": 5.0, "logit_scale": 0.5}
    expected = linear_kd_loss(HIDDEN, WEIGHT, C.targets, C.labels, **parts)
    for found in (
        linear_kd_loss(HIDDEN, LMHead(WEIGHT, **parts), C.targets, C.labels),
        DistillationLoss().linear(HIDDEN, LMHead(WEIGHT, **parts), C.targets, C.labels),
    ):
        assert torch.equal(found.loss, expected.loss)
    for name, value in parts.items():
        with pytest.raises(KDError, match=f"{name}: got .* beside an LMHead"):
            linear_kd_loss(HIDDEN, LMHead(WEIGHT), C.targets, C.labels, **{name: value})


@pytest.mark.parametrize(
    ("treatment", "divergence", "t", "draws", "resolved"),
    [
        ("auto", "forward_kl", 1.5, True, "sampled"),
        ("auto", "forward_kl", 1.6, True, "bucket"),
        ("auto", "forward_kl", None, True, "auto"),
        ("auto", "forward_kl", None, False, "bucket"),
        ("auto", "tvd", 1.0, True, "bucket"),
        ("sampled", "forward_kl", 4.0, True, "sampled"),
        ("sampled", "forward_kl", 4.0, False, "bucket"),
        ("renormalize", "forward_kl", None, True, "renormalize"),
        ("bucket", "jsd", 1.0, True, "bucket"),
    ],
)
def test_treatments(treatment: str, divergence: str, t: float | None, draws: bool, resolved: str) -> None:
    assert resolve_treatment(treatment, t, has_draws=draws, divergence=divergence) == resolved
    if t is not None and draws:
        assert (
            resolve_treatment(treatment, 2 * t, has_draws=True, draw_temperature=2, divergence=divergence) == resolved
        )


@pytest.mark.parametrize(
    ("treatment", "divergence", "t", "says"),
    [
        ("drop", "forward_kl", 1.0, "treatment: got 'drop'; expected one of auto, bucket"),
        ("sampled", "jsd", 1.0, "treatment: got 'sampled' with divergence 'jsd'"),
        ("auto", "kl", 1.0, "divergence: got 'kl'; expected one of forward_kl"),
        ("bucket", "forward_kl", 1.0, "got 'bucket' for targets that hold draws and no top-k entries"),
        ("auto", "forward_kl", 2.0, "got 'auto', here 'bucket', for .*up to a temperature of 1.5"),
        ("auto", "tvd", 1.0, "got 'auto', here 'bucket', for"),
    ],
)
def test_refused_treatments(treatment: str, divergence: str, t: float, says: str) -> None:
    with pytest.raises(KDError, match=says):
        resolve_treatment(treatment, t, has_draws=True, has_topk=False, divergence=divergence)
