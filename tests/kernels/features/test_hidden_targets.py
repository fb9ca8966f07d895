"""HiddenTargets: coordinates and states against float64, exact rows, rows taken and joined, devices, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd.kernels import HiddenTargets, KDError

STEP = 0.1


def hidden(seed: int = 0, rows: int = 40, width: int = 12, *, sinks: tuple[int, ...] = (0, 17)) -> Tensor:
    """States with correlated components, a mean, and rows of a hundred times the norm."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mix + 2
    for row in sinks:
        x[row] *= 100
    return x


def targets_of(x: Tensor, **options: object) -> HiddenTargets:
    return HiddenTargets.from_states(x, step=STEP, **options)


def reference(t: HiddenTargets) -> tuple[Tensor, Tensor]:
    """Coordinates and states, row by row, in float64."""
    mean, basis, numbers = t.mean.double(), t.basis.double(), t.exact_rows.tolist()
    z, x = [], []
    for i in range(len(t)):
        if i in numbers:
            x.append(t.exact[numbers.index(i)].double())
            z.append(x[-1] / x[-1].square().mean().sqrt() @ basis)
        else:
            z.append(t.codes[i].double() * t.step + mean @ basis)
            x.append(float(t.scale[i]) * (basis @ z[-1]))
    return torch.stack(z), torch.stack(x)


def test_coordinates_and_states_are_those_of_the_definition() -> None:
    t = targets_of(hidden())
    z, x = reference(t)
    assert t.exact_rows.tolist() == [0, 17]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
        assert t.coordinates(dtype=dtype).dtype == dtype
        assert torch.allclose(t.coordinates(dtype=dtype).double(), z, atol=tolerance, rtol=tolerance)
        assert torch.allclose(t.states(dtype=dtype).double(), x, atol=100 * tolerance, rtol=tolerance)
        assert torch.allclose((t.scales(dtype=dtype)[:, None] * t.units(dtype=dtype)).double(), x, rtol=1e-5, atol=1e-4)
    out = torch.full((40, 12), torch.nan)
    assert t.coordinates(out=out) is out
    assert torch.equal(out, t.coordinates())


def test_states_are_coded_within_half_a_step() -> None:
    x = hidden()
    t = targets_of(x)
    error = (t.coordinates(dtype=torch.float64) - x / t.scales(dtype=torch.float64)[:, None] @ t.basis.double()).abs()
    assert STEP / 4 < float(error.max()) <= STEP / 2 + 1e-5
    assert torch.equal(t.states()[[0, 17]], x[[0, 17]].float())


def test_the_basis_is_orthonormal_and_decorrelates() -> None:
    x = hidden(rows=400)
    t = HiddenTargets.from_states(x, step=1e-3)
    basis = t.basis.double()
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-6)
    keep = torch.ones(400, dtype=torch.bool)
    keep[t.exact_rows] = False
    covariance = t[keep].coordinates(dtype=torch.float64).T.cov(correction=0)
    variance = covariance.diagonal()
    assert torch.allclose(covariance, torch.diag(variance), atol=2e-3)
    assert bool((variance.diff() < 0).all())


def test_a_given_basis_is_used_and_its_scale_decides_what_a_sink_is() -> None:
    x = hidden(sinks=())
    t = targets_of(x)
    same = SimpleNamespace(mean=t.mean.numpy(), basis=t.basis.numpy())
    again = targets_of(x, basis=same)
    assert torch.equal(again.codes, t.codes)
    far = targets_of(x, basis=SimpleNamespace(**vars(same), scale=1e3 * float(t.scale.median())))
    assert len(far.exact_rows) == 40
    assert torch.equal(far.states(), x.float())


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e6])
def test_rows_that_the_codec_cannot_hold_are_exact(value: float) -> None:
    x = hidden(sinks=())
    x[5] = value
    t = targets_of(x)
    assert t.exact_rows.tolist() == [5]
    assert torch.equal(t.states()[5], x[5].float())
    assert bool(t.coordinates().isfinite().all())


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_exact_rows_whose_squares_are_beyond_float32(value: float) -> None:
    x = hidden(sinks=())
    x[5] *= value
    t = targets_of(x)
    assert t.exact_rows.tolist() == [5]
    z = x[5].double() / x[5].double().square().mean().sqrt() @ t.basis.double()
    torch.testing.assert_close(t.coordinates()[5].double(), z, rtol=1e-5, atol=1e-5)
    assert float(t.scales()[5]) == pytest.approx(float(x[5].double().square().mean().sqrt()), rel=1e-5)


def test_codes_beyond_int16_are_exact() -> None:
    x = hidden(sinks=())
    t = HiddenTargets.from_states(x, step=1e-5)
    assert len(t.exact_rows) == 40
    assert torch.equal(t.states(), x.float())


@pytest.mark.parametrize(
    "rows", [slice(3, 30), slice(None, None, 5), torch.tensor([17, 0, 17, 3]), "mask", slice(0, 0)]
)
def test_rows_move_together(rows: object) -> None:
    t = targets_of(hidden(), index=torch.arange(40) * 2)
    rows = torch.arange(40) % 3 != 1 if isinstance(rows, str) else rows
    some = t[rows]
    assert torch.equal(some.coordinates(), t.coordinates()[rows])
    assert torch.equal(some.states(), t.states()[rows])
    assert torch.equal(some.index, t.index[rows])
    assert bool((some.exact_rows.diff() > 0).all())


def test_the_parts_make_the_whole_again() -> None:
    t = targets_of(hidden(), index=torch.arange(40))
    whole = HiddenTargets.cat([t[:5], t[5:5], t[5:18], t[18:]])
    for one, other in zip(whole.tensors(), t.tensors(), strict=True):
        assert torch.equal(one, other)
    assert HiddenTargets.cat([t]) is t
    for other, says in (
        (replace(t, step=0.3), "different step: "),
        (replace(t, mean=t.mean + 1), "different mean"),
        (replace(t, basis=-t.basis), "different basis"),
        (replace(t, index=None), "index in all or in none"),
    ):
        with pytest.raises(KDError, match=f"cat: .*{says}"):
            HiddenTargets.cat([t, other])
    with pytest.raises(KDError, match="cat: got no targets"):
        HiddenTargets.cat([])


def test_arrays_of_a_shard() -> None:
    t = targets_of(hidden())
    arrays = {name: getattr(t, name).numpy() for name in ("codes", "scale", "exact_rows", "exact")}
    basis = SimpleNamespace(mean=t.mean, basis=t.basis)
    again = HiddenTargets.from_arrays(arrays | {"rows": np.arange(40)}, basis, STEP, index=np.arange(40) * 3)
    assert torch.equal(again.states(), t.states())
    assert again.basis is t.basis
    assert again.codes.data_ptr() == t.codes.data_ptr()
    assert torch.equal(again.index, torch.arange(40) * 3)
    del arrays["exact"]
    with pytest.raises(KDError, match="arrays: got no 'exact' among codes, scale"):
        HiddenTargets.from_arrays(arrays, basis, STEP)


def test_the_basis_is_copied_to_a_device_once() -> None:
    t = targets_of(hidden())
    one, other = t[:20].to("meta"), t[20:].to("meta", non_blocking=True)
    assert {x.device.type for x in one.tensors()} == {"meta"}
    assert one.basis is other.basis
    assert one.codes is not other.codes
    assert t.to("cpu").basis is t.basis


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes": torch.zeros(40, dtype=torch.int16)}, r"codes: got shape \(40,\); expected \(rows, components\)"),
        ({"codes": torch.zeros(40, 12)}, "codes: got torch.float32; expected an integer type"),
        ({"scale": torch.zeros(3)}, r"scale: got shape \(3,\); expected \(40,\), to fit codes"),
        ({"scale": [1.0]}, r"scale: got \[1.0\]; expected a tensor"),
        ({"mean": torch.zeros(3)}, "mean: got shape"),
        ({"basis": torch.zeros(12, 3)}, r"basis: got shape \(12, 3\); expected \(12, 12\)"),
        ({"exact_rows": torch.tensor(1)}, r"exact_rows: got shape \(\)"),
        ({"exact": torch.zeros(3, 12)}, r"exact: got shape \(3, 12\); expected \(2, 12\)"),
        ({"index": torch.zeros(40)}, "index: got torch.float32"),
        ({"step": 0.0}, "step: got 0.0"),
        ({"step": "a"}, "step: got 'a'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, says: str) -> None:
    with pytest.raises(KDError, match=says):
        replace(targets_of(hidden()), **change)


def test_states_that_cannot_be_coded_are_refused() -> None:
    x = hidden()
    x[7, 3] = torch.nan
    with pytest.raises(KDError, match="NaN or infinity in row 7") as caught:
        targets_of(x)
    assert caught.value.row == 7
    with pytest.raises(KDError, match=r"states: got \(12,\) torch.float64"):
        targets_of(hidden()[0])
    with pytest.raises(KDError, match="step: got -1"):
        HiddenTargets.from_states(hidden(), step=-1)
    with pytest.raises(KDError, match="expected a slice"):
        targets_of(hidden())[3]


def test_targets_of_no_rows() -> None:
    t = targets_of(torch.zeros(0, 12))
    assert t.coordinates().shape == t.states().shape == (0, 12)
