"""Launches of the loss's kernels: on the device of the tensors, with options that the GPU's back end has."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from cases import case
from test_matrix import INTERPRETED

from fastkd import kd_loss, linear_kd_loss


@INTERPRETED
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors may lie on another device than the current one."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from fastkd.kernels.loss import row_passes, triton_impl

    launch, current, launches = interpreter.GridExecutor.__call__, [], []

    @contextlib.contextmanager
    def on_device(x: torch.Tensor) -> Iterator[None]:
        current.append(x.device)
        yield
        current.pop()

    def checked(self, *args, **options):
        assert current, "a kernel is launched on the current device"
        launches.append(self.fn.__name__)
        return launch(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
    for module in (row_passes, triton_impl):
        monkeypatch.setattr(module, "on_device", on_device)
    c = case("plain", 4, 40, 5)
    index = torch.tensor([2, 0])
    rows = c.targets[index]
    compact = type(rows)(**{**vars(rows), "index": index})
    leaf = c.logits.clone().requires_grad_()
    kd_loss(leaf, compact, c.labels, impl="triton").loss.backward()
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    linear_kd_loss(hidden, weight, c.targets, c.labels, impl="triton").loss.backward()
    assert {"prepare_kernel", "loss_kernel", "total_kernel", "zero_uncovered_kernel", "scale_kernel"} <= {*launches}


def test_the_device_of_a_tensor_becomes_the_current_one() -> None:
    math = pytest.importorskip("fastkd.kernels.triton_math")
    with torch._subclasses.FakeTensorMode():
        found = math.on_device(torch.empty(2, device="cuda:1"))
    assert isinstance(found, torch.cuda.device)
    assert found.idx == 1
    assert isinstance(math.on_device(torch.empty(2)), contextlib.nullcontext)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [3, 100, 1000, 32000, 50257, 128256, 262144])
def test_settings_are_ones_that_the_back_end_takes(width: int, itemsize: int) -> None:
    passes = pytest.importorskip("fastkd.kernels.loss.row_passes")
    for backend, lanes in (("cuda", 32), ("hip", 64), ("hip", 32)):
        found = passes.sweep_settings(width, itemsize, backend, lanes)
        assert found["num_warps"] * lanes == found["THREADS"] <= 1024
        assert found["BLOCK"] % (found["THREADS"] * found["VEC"]) == 0
        assert found["VEC"] * itemsize == 16
        assert found["BLOCK"] // found["THREADS"] <= 32
        assert ("maxnreg" in found) == (backend == "cuda")
