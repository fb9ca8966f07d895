"""Rows that start anywhere in memory: vectors of 16 bytes where they can be, and single columns around them."""

import pytest
import torch
from cases import case
from test_matrix import DEVICE_ON, INTERPRETED, agree, oracle

from fastkd import kd_loss

SETTINGS = {"divergence": "forward_kl", "treatment": "bucket", "temperature": 2.0}


@DEVICE_ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("v", [5, 101, 1031])
def test_an_odd_vocabulary(v: int, dtype: torch.dtype, on) -> None:
    """Contiguous rows, rows of a padded buffer, and rows that no two of start alike; in place and not."""
    impl, device = on
    c = case("plain", 9, v, min(v - 1, 5))
    c.logits = c.logits.to(dtype)
    expected = oracle(c, 1024.0, **SETTINGS)
    slices = [torch.zeros(9, v + 16 - v % 8, dtype=dtype)[:, first : v + first].copy_(c.logits) for first in (0, 3)]
    for base in (c.logits, *slices):
        for inplace in (False, True):
            # the same strides and offset: a clone of the slice would be contiguous
            buffer = torch.zeros(base.untyped_storage().nbytes() // base.element_size(), dtype=dtype, device=device)
            leaf = torch.as_strided(buffer, base.shape, base.stride(), base.storage_offset()).copy_(base)
            leaf = leaf.detach().requires_grad_()
            out = kd_loss(leaf, c.targets.to(device), c.labels.to(device), impl=impl, inplace=inplace, **SETTINGS)
            out.loss.backward(torch.tensor(1024.0, device=device))
            if dtype == torch.float32:
                agree(c, (out.loss.detach().cpu(), leaf.grad.cpu()), expected, 1024.0, 2.0)
            else:
                assert float((leaf.grad.cpu().double() - expected[1]).norm() / expected[1].norm()) < 1e-3
            outside = torch.ones_like(buffer, dtype=torch.bool)
            torch.as_strided(outside, base.shape, base.stride(), base.storage_offset()).fill_(False)
            assert not buffer[outside].any()


@INTERPRETED
def test_an_odd_vocabulary_without_some_top_k_entries_at_the_edges() -> None:
    """A student certain of its answer: the columns around the vectors are left out of the sum, too."""
    pytest.importorskip("triton")
    c = case("certain", 9, 101, 60)
    settings = SETTINGS | {"temperature": 1.0}
    leaf = c.logits.clone().requires_grad_()
    out = kd_loss(leaf, c.targets, c.labels, impl="triton", **settings)
    out.loss.backward()
    agree(c, (out.loss.detach(), leaf.grad), oracle(c, **settings), 1.0, 1.0)


def test_vectors_need_dense_rows() -> None:
    """Of transposed logits, whose rows step by V in the gradient, no row lies as the gradient's does."""
    pytest.importorskip("triton")
    from fastkd.kernels.loss.triton_impl import lie_alike

    dense = torch.empty(1, 4, 32001, dtype=torch.bfloat16)
    assert lie_alike(dense, torch.empty_like(dense))
    transposed = torch.empty(1, 32001, 4, dtype=torch.bfloat16).transpose(1, 2)
    assert not lie_alike(transposed, dense)
    assert not lie_alike(transposed, transposed)
