"""Capped logits from one end of float32 to the other."""

import math

import pytest
import torch
from cases import case
from test_matrix import DEVICE_ON

from fastkd import kd_loss, linear_kd_loss


@DEVICE_ON
@pytest.mark.parametrize("softcap", [5.0, 30.0, 50.0])
def test_capped_logits(softcap: float, on) -> None:
    """From far below the cap to far beyond it on either side, and tokens that a bias of −inf rules out."""
    impl, device = on
    c = case("plain", 6, 90, 5)
    scale = torch.tensor([0.01, 1.0, 10.0, 40.0, 1e3, 1e5])
    raw = c.logits * scale[:, None]
    bias = torch.zeros(90)
    ruled_out = [j for j in range(90) if not (c.targets.ids == j).any() and not (c.labels == j).any()][:4]
    bias[ruled_out] = -math.inf
    weight = raw.T.contiguous().to(device).requires_grad_()
    hidden = torch.eye(6, device=device)
    settings = {"temperature": 2.0, "treatment": "bucket"}
    out = linear_kd_loss(
        hidden,
        weight,
        c.targets.to(device),
        c.labels.to(device),
        bias=bias.to(device),
        softcap=softcap,
        impl=impl,
        **settings,
    )
    out.loss.backward()
    exact = (raw.double() + bias.double()).requires_grad_()
    capped = torch.where(exact == -math.inf, exact, softcap * torch.tanh(exact / softcap))
    expected = kd_loss(capped, c.targets, c.labels, impl="torch", **settings)
    expected.loss.backward()
    # the float64 gradient of a token that is ruled out is 0 * (1 - tanh^2) = 0
    assert float(out.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    assert float((weight.grad.T.cpu().double() - exact.grad.nan_to_num()).abs().max()) < 1e-6 * max(1.0, softcap / 5)
