"""CKA over batches: the definition on all rows at once, tables, widths, and what is refused."""

import pytest
import torch
from loss_cases import draw, hidden_targets
from torch import Tensor

from fastkd.kernels import CKA, KDError


def definition(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. 2019, equations 2 and 3: the alignment of two centered kernels."""
    centering = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, m = (centering @ (z @ z.T) @ centering for z in (x.double(), y.double()))
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())


@pytest.mark.parametrize("bounds", [(0, 60), (0, 1, 1, 20, 60)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_are_all_rows_at_once(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = draw(60, 9) + 50, draw(60, 5, seed=1) - 1000  # far from zero
    y[:, :2] += 2 * x[:, :2]
    cka = CKA()
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):  # noqa: RUF007
        cka.update(x[a:b].to(dtype), y[a:b].to(dtype))
    assert cka.rows == 60
    assert 0.3 < definition(x, y) < 0.95
    assert cka.value() == pytest.approx(definition(x, y), abs=1e-9 if dtype == torch.float64 else 1e-4)


def test_a_table_of_several_layers() -> None:
    xs, ys = [draw(60, 9, seed=i) for i in (0, 1)], [draw(60, w, seed=w) for w in (4, 5, 6)]
    ys[1] = xs[1][:, :5]
    cka = CKA()
    for rows in (slice(0, 40), slice(40, 60)):
        cka.update([x[rows] for x in xs], tuple(y[rows] for y in ys))
    table = cka.value()
    assert table.shape == (2, 3)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            assert float(table[i, j]) == pytest.approx(definition(x, y), abs=1e-9)


def test_a_rotation_and_a_scale_change_nothing_and_coordinates_serve_for_states() -> None:
    x, y = draw(60, 12), draw(60, 5, seed=1)
    turn = torch.linalg.qr(draw(12, 12, seed=3)).Q
    values = []
    for left in (x, x @ turn * 7):
        cka = CKA()
        cka.update(left, y)
        values.append(cka.value())
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    targets = hidden_targets()
    one, other = CKA(), CKA()
    one.update(targets.coordinates(dtype=torch.float64), draw(40, 5))
    other.update(targets.units(dtype=torch.float64), draw(40, 5))
    assert one.value() == pytest.approx(other.value(), abs=1e-12)
    same = CKA()
    same.update(x, 3 * x @ turn + 1)
    assert same.value() == pytest.approx(1)


def test_a_constant_representation_is_aligned_with_nothing() -> None:
    cka = CKA()
    cka.update(draw(9, 4), torch.ones(9, 3))
    assert cka.value() == 0


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(KDError, match="CKA: got no rows"):
        CKA().value()
    cka = CKA()
    for x, y, says in (
        (draw(5, 3), draw(4, 3), r"CKA: got \(4, 3\) torch.float64; expected tensors \(rows, components\)"),
        (draw(5), draw(5, 3), r"CKA: got \(5,\)"),
        ([draw(5, 3)], [], "CKA: got 1 and 0 representations"),
    ):
        with pytest.raises(KDError, match=says):
            cka.update(x, y)
    cka.update(draw(5, 3), draw(5, 2))
    with pytest.raises(KDError, match="expected as many as before"):
        cka.update([draw(5, 3)], [draw(5, 2)])
    with pytest.raises(KDError, match="CKA: got 4 components; expected 3, as before"):
        cka.update(draw(5, 4), draw(5, 2))
