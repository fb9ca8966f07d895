"""Bad input: one error class that names the argument, what was got and what is expected."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import case, sparse
from test_matrix import IMPLS_ON_CPU, INTERPRETED
from torch.autograd import forward_ad

from fastkd import KDError, SparseTargets, kd_loss, linear_kd_loss, set_debug

C = case("plain", 6, 50, 4, 3)


def changed(**fields) -> SparseTargets:
    return SparseTargets(**{**vars(C.targets), **fields})


def with_value(name: str, row: int, column: int, value) -> SparseTargets:
    tensor = getattr(C.targets, name).clone()
    tensor[row, column] = value
    return changed(**{name: tensor})


SETTINGS = [
    ({"alpha": -0.1}, "alpha: got -0.1"),
    ({"alpha": 1.5}, "alpha: got 1.5"),
    ({"alpha": math.nan}, "alpha: got nan"),
    ({"alpha": torch.tensor([0.5])}, "alpha: got a tensor"),
    ({"alpha": torch.tensor(2.0)}, "alpha: got 2.0"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": 0.5}, "below the lowest stored one"),
    ({"temperature": torch.tensor(0.5)}, "below the lowest stored one"),
    ({"divergence": "kl"}, "divergence: got 'kl'; expected one of forward_kl"),
    ({"treatment": "drop"}, "treatment: got 'drop'"),
    ({"treatment": "sampled", "divergence": "jsd"}, "treatment: got 'sampled' with divergence 'jsd'"),
    ({"treatment": "renormalize", "divergence": "reverse_kl"}, "which needs the teacher's probability"),
    ({"beta": 0.0}, "beta: got 0.0"),
    ({"skew": 1.0}, "skew: got 1.0"),
    ({"impl": "cuda"}, "impl: got 'cuda'"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, "mask: got shape"),
    ({"mask": torch.ones(6)}, "mask: got torch.float32"),
    ({"weights": torch.ones(7)}, "weights: got shape"),
    ({"weights": torch.ones(6, dtype=torch.int64)}, "weights: got torch.int64"),
    ({"weights": torch.full((6,), math.nan)}, "weights: row 0"),
    ({"num_items": -3}, "num_items: got -3"),
    ({"num_items": 4.0}, "num_items: got 4.0"),
    ({"num_items": torch.tensor([3])}, "num_items"),
    ({"num_items": torch.tensor(-2)}, "num_items"),
    ({"num_items": True}, "num_items: got True"),
    ({"num_items": 2**70}, "num_items: got 1180591620717411303424; .* below 2.63"),
    ({"num_items": torch.tensor(2j)}, "num_items: got a tensor of torch.complex64"),
    ({"alpha": "0.5"}, "alpha: got '0.5'"),
    ({"group": 3}, r"group: got none: this process is no member of it; expected the torch.distributed.ProcessGroup"),
    ({"group": "tp"}, r"group: got 'tp' .*; expected the torch.distributed.ProcessGroup"),
    ({"vocab_start": 0}, "vocab_start: got 0 without a group; pass the ranks' process group"),
    ({"alpha": None}, "alpha: got None"),
    ({"alpha": torch.tensor(1j)}, "alpha: got a tensor of torch.complex64"),
    ({"temperature": "2"}, "temperature: got '2'"),
    ({"temperature": 1e30}, "temperature: got 1e.30; expected at most 1000"),
    ({"temperature": torch.tensor(1e4)}, "temperature: got 10000.0; expected at most 1000"),
    ({"temperature": torch.tensor(True)}, "temperature: got a tensor of torch.bool"),
    ({"beta": "a"}, "beta: got 'a'"),
    ({"skew": None}, "skew: got None"),
    ({"ignore_index": None}, "ignore_index: got None"),
    ({"ignore_index": -0.5}, "ignore_index: got -0.5"),
    ({"mask": [True] * 6}, "mask: got list"),
    ({"weights": [1.0] * 6}, "weights: got list"),
    ({"weights": torch.ones(6, requires_grad=True)}, r"weights: got .* Pass weights\.detach"),
    ({"alpha": torch.tensor(0.5, requires_grad=True)}, r"alpha: got .* Pass alpha\.detach"),
    ({"temperature": torch.tensor(2.0, requires_grad=True)}, r"temperature: got .* Pass temperature\.detach"),
    ({"num_items": torch.tensor(2.0, requires_grad=True)}, r"num_items: got .* Pass num_items\.detach"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS)
def test_settings(settings: dict, says: str) -> None:
    weight = torch.randn(50, 4)
    with pytest.raises(KDError, match=says):
        kd_loss(C.logits, C.targets, C.labels, **settings)
    with pytest.raises(KDError, match=says):
        linear_kd_loss(torch.randn(6, 4), weight, C.targets, C.labels, **settings)


def test_numpy_numbers_are_numbers() -> None:
    expected = kd_loss(C.logits, C.targets, C.labels, num_items=7, alpha=0.25, temperature=2)
    settings = {"alpha": np.float32(0.25), "temperature": np.float64(2), "ignore_index": np.int32(-100)}
    targets = changed(vocab_size=np.int64(50), draw_temperature=np.float32(1), temperatures=np.array([1.0, 1.5, 2, 4]))
    for count in (np.int64(7), np.array(7), torch.tensor(7, dtype=torch.uint8)):
        assert torch.equal(kd_loss(C.logits, targets, C.labels, num_items=count, **settings).loss, expected.loss)


def test_constants_may_require_a_gradient_where_none_is_taken() -> None:
    alpha = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        kd_loss(C.logits, C.targets, C.labels, alpha=alpha)
    with pytest.raises(KDError, match=r"targets\.logprobs: got .* Pass targets\.logprobs\.detach"):
        kd_loss(C.logits, changed(logprobs=C.targets.logprobs.clone().requires_grad_()), C.labels)


VALUES = [
    ({"targets": with_value("ids", 3, 1, 50)}, "targets.ids: row 3"),
    ({"targets": with_value("ids", 3, 1, -1)}, "targets.ids: row 3"),
    ({"targets": with_value("ids", 4, 1, int(C.targets.ids[4, 0]))}, "targets.ids: row 4 .*at most once"),
    ({"targets": with_value("logprobs", 4, 0, math.nan)}, "targets.logprobs: row 4"),
    ({"targets": with_value("logprobs", 4, 0, 0.2)}, "targets.logprobs: row 4 .*0 or less"),
    ({"targets": with_value("logprobs", 4, 0, math.inf)}, "targets.logprobs: row 4"),
    ({"targets": with_value("tail", 1, 2, math.nan)}, "targets.tail: row 1"),
    ({"targets": with_value("tail", 1, 2, -math.inf)}, "targets.tail: row 1 .*all temperatures"),
    ({"targets": with_value("draws", 5, 4, -1)}, "targets.draws: row 5"),
    ({"targets": changed(outcomes=torch.tensor([46, 46, 46, -1, 46, 46]))}, "targets.outcomes: row 3 has .-1.;"),
    ({"targets": changed(outcomes=torch.tensor([46, 46, 46, 46, 51, 46]))}, "targets.outcomes: row 4 has .51.;"),
    ({"targets": changed(outcomes=torch.tensor([0, 46, 46, 46, 46, 46]))}, "targets.outcomes: row 0 .*stands for"),
    ({"targets": changed(outcomes=60)}, "targets.outcomes: row 0 has .60.;"),
    ({"labels": torch.tensor([0, 1, 50, 3, 4, 5])}, "labels: row 2 has .50."),
    ({"labels": torch.tensor([0, 1, -5, 3, 4, 5])}, "labels: row 2"),
    ({"targets": changed(index=torch.tensor([0, 1, 2, 3, 4, 9]))}, "targets.index: row 5"),
    ({"targets": changed(index=torch.tensor([0, 1, 2, 3, 4, 4]))}, "targets.index: row 4 .*at most once"),
]


@pytest.mark.parametrize(("change", "says"), VALUES)
@IMPLS_ON_CPU
def test_values_on_the_cpu(change: dict, says: str, impl: str) -> None:
    with pytest.raises(KDError, match=says):
        kd_loss(C.logits, **{"targets": C.targets, "labels": C.labels, "impl": impl, **change})


def test_a_coded_logprob_may_lie_just_above_zero() -> None:
    targets = with_value("logprobs", 4, 0, 0.1)
    assert kd_loss(C.logits, targets, C.labels).loss.isfinite()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@IMPLS_ON_CPU
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(value: float, alpha: float, impl: str) -> None:
    """One NaN or +inf, or nothing but -inf, in a row that counts: refused whatever its factor in the loss."""
    logits, hidden = C.logits.clone(), torch.eye(6)
    logits[4, 17 if value != -math.inf else slice(None)] = value
    with pytest.raises(KDError, match=r"logits: row .* NaN or infinite"):
        kd_loss(logits, C.targets, C.labels, alpha=alpha, impl=impl)
    weight = torch.randn(50, 6)
    if value == -math.inf:
        weight[:, 4] = value  # the products with the zeros of the other rows are NaN
    else:
        weight[17, 4] = value
    with pytest.raises(KDError, match=r"hidden @ weight\.T: row .* NaN or infinite"):
        linear_kd_loss(hidden, weight, C.targets, C.labels, alpha=alpha, impl=impl)


def test_shapes() -> None:
    with pytest.raises(KDError, match="narrower than"):
        kd_loss(C.logits[:, :49], C.targets, C.labels)
    with pytest.raises(KDError, match="targets: got 6 rows"):
        kd_loss(C.logits[:4], C.targets, C.labels[:4])
    with pytest.raises(KDError, match="labels: got shape"):
        kd_loss(C.logits, C.targets, C.labels[:4])
    with pytest.raises(KDError, match=r"labels: got torch\.float32"):
        kd_loss(C.logits, C.targets, C.labels.float())
    with pytest.raises(KDError, match=r"logits: got .*int64"):
        kd_loss(C.logits.long(), C.targets, C.labels)
    with pytest.raises(KDError, match="logits"):
        kd_loss(C.logits[0], C.targets, C.labels)
    hidden, weight = torch.randn(6, 4), torch.randn(50, 4)
    for change, says in [
        ({"weight": torch.randn(50, 5)}, "weight: got shape"),
        ({"weight": weight.double()}, "weight: got torch.float64"),
        ({"bias": torch.randn(49)}, "bias: got"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"logit_scale": -1.0}, "logit_scale: got -1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens: got 0"),
        ({"grad_weight": torch.zeros(50, 4, dtype=torch.float64)}, "grad_weight: got"),
    ]:
        with pytest.raises(KDError, match=says):
            linear_kd_loss(**{"hidden": hidden, "weight": weight, "targets": C.targets, "labels": C.labels, **change})


def test_things_that_are_something_else() -> None:
    """What is no tensor, no number or no targets is a KDError too, not whatever Python makes of it."""
    hidden, weight = torch.randn(6, 4), torch.randn(50, 4)
    for change, says in [
        ({"targets": None}, "targets: got None;"),
        ({"targets": vars(C.targets)}, "targets: got dict"),
        ({"logits": C.logits.tolist()}, "logits: got .*list"),
        ({"logits": C.logits + 1j}, "logits: got .*complex64"),
        ({"logits": C.logits.to(torch.float8_e4m3fn)}, "logits: got .*float8"),
        ({"logits": C.logits.to_sparse()}, "logits: got"),
        ({"labels": C.labels.numpy()}, "labels: got ndarray"),
        ({"labels": C.labels + 1j}, "labels: got torch.complex64"),
        ({"labels": C.labels.clamp(min=0).to(torch.uint16)}, "labels: got torch.uint16"),
    ]:
        with pytest.raises(KDError, match=says):
            kd_loss(**{"logits": C.logits, "targets": C.targets, "labels": C.labels, **change})
    for change, says in [
        ({"weight": [1.0]}, "weight: got"),
        ({"weight": None}, "weight: got None"),
        ({"bias": [1.0]}, "bias: got"),
        ({"bias": torch.zeros(50, dtype=torch.int64)}, "bias: got"),
        ({"softcap": "a"}, "softcap: got 'a'"),
        ({"logit_scale": torch.tensor(2.0)}, "logit_scale: got tensor"),
        ({"chunk_tokens": 2.5}, "chunk_tokens: got 2.5"),
    ]:
        with pytest.raises(KDError, match=says):
            linear_kd_loss(**{"hidden": hidden, "weight": weight, "targets": C.targets, "labels": C.labels, **change})


@IMPLS_ON_CPU
def test_small_integer_types(impl: str) -> None:
    """Labels, ids, draws and index of every type that torch computes with; wider unsigned ones are refused."""
    labels, index = C.labels.clamp(min=0), torch.arange(6)
    expected = kd_loss(C.logits, C.targets, labels, impl=impl).loss
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        some = {name: getattr(C.targets, name).to(dtype) for name in ("ids", "draws", "outcomes")}
        targets = changed(**some, index=index.to(dtype))
        assert torch.equal(kd_loss(C.logits, targets, labels.to(dtype), impl=impl).loss, expected)
    for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool):
        for name in ("ids", "draws", "outcomes"):
            with pytest.raises(KDError, match=rf"targets\.{name}: got {dtype}; expected an integer type"):
                changed(**{name: getattr(C.targets, name).to(dtype)})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own forward mode needs it
@IMPLS_ON_CPU
def test_second_derivatives_and_forward_mode_are_refused(impl: str) -> None:
    """Gradients are constants: through them nothing flows, and a penalty on them would silently be none."""
    hidden, weight = torch.randn(6, 4), torch.randn(50, 4)

    def losses(logits, hidden):
        for inplace in (False, True):
            for dtype in (torch.float32, torch.float16):
                yield kd_loss(logits.to(dtype) * 1, C.targets, C.labels, impl=impl, inplace=inplace).loss
        yield linear_kd_loss(hidden, weight, C.targets, C.labels, impl=impl).loss

    leaves = C.logits.clone().requires_grad_(), hidden.clone().requires_grad_()
    for loss in losses(*leaves):
        with pytest.raises(KDError, match="create_graph=True"):
            torch.autograd.grad(loss * 2, leaves, create_graph=True, allow_unused=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(C.logits, torch.ones_like(C.logits))
        with pytest.raises(KDError, match="logits: got a forward-mode tangent"):
            kd_loss(dual, C.targets, C.labels, impl=impl)
        for number, name in enumerate(("hidden", "weight", "bias")):
            given = [hidden, weight, torch.zeros(50)]
            given[number] = forward_ad.make_dual(given[number], torch.ones_like(given[number]))
            with pytest.raises(KDError, match=f"{name}: got a forward-mode tangent"):
                linear_kd_loss(*given[:2], C.targets, C.labels, bias=given[2], impl=impl)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("compiled", "impl"),
    [(False, "torch"), (False, "reference"), pytest.param(False, "triton", marks=INTERPRETED), (True, "torch")],
)
def test_transforms_are_refused(compiled: bool, impl: str) -> None:
    """Under them a tensor hides that it requires a gradient: it would silently be none."""
    hidden, weight = torch.randn(6, 4), torch.randn(50, 4)

    def on_logits(x: torch.Tensor) -> torch.Tensor:
        return kd_loss(x, C.targets, C.labels, impl=impl).loss

    def on_hidden(x: torch.Tensor) -> torch.Tensor:
        return linear_kd_loss(x, weight, C.targets, C.labels, impl=impl).loss

    for number, (loss, x) in enumerate(((on_logits, C.logits), (on_hidden, hidden))):
        runs = (
            lambda x, loss=loss: torch.func.grad(loss)(x),
            lambda x, loss=loss: torch.func.vmap(loss)(x[None]),
            lambda x, loss=loss: torch.func.jvp(loss, (x,), (x,)),
        )
        for run in runs[number : number + 1] if compiled else runs:  # to compile takes seconds
            torch._dynamo.reset()
            with pytest.raises(KDError, match=r"torch\.func transform"):
                (torch.compile(run, backend="eager") if compiled else run)(x)


def test_draws_alone_are_refused_by_what_needs_a_head() -> None:
    targets = sparse(torch.randn(6, 50), 0, 5)
    kd_loss(C.logits, targets, C.labels)
    for treatment in ("bucket", "renormalize"):
        with pytest.raises(KDError, match="draws and no top-k entries"):
            kd_loss(C.logits, targets, C.labels, treatment=treatment)
    with pytest.raises(KDError, match="draws and no top-k entries"):
        kd_loss(C.logits, targets, C.labels, temperature=4.0)


def test_too_small_a_grid_is_refused_off_it() -> None:
    targets = sparse(torch.randn(6, 50), 4, grid=(1.0, 2.0))
    kd_loss(C.logits, targets, C.labels, temperature=2.0)
    for t in (1.5, torch.tensor(1.5)):
        with pytest.raises(KDError, match="at least 3 stored temperatures"):
            kd_loss(C.logits, targets, C.labels, temperature=t)


ON_A_CPU = """
import os, torch, fastkd
targets = fastkd.SparseTargets.from_logits(torch.randn(2, 20), 3, impl="torch")
calls = (
    lambda: fastkd.kd_loss(torch.randn(2, 20), targets, torch.tensor([1, 2]), impl="triton"),
    lambda: fastkd.topk_targets(torch.randn(2, 20), 3, impl="triton"),
)
for interpret in "01":  # the second time it is too late: the kernels have been imported
    os.environ["TRITON_INTERPRET"] = interpret
    for call in calls:
        try:
            call()
        except fastkd.KDError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux")
def test_triton_on_a_cpu_tensor() -> None:
    """Refused by both halves in a process whose kernels were not imported to be interpreted."""
    result = subprocess.run([sys.executable, "-c", ON_A_CPU], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == 4
    assert all(line.startswith("impl: got 'triton' with a tensor on cpu") for line in said[::2])
    assert all(line.startswith("impl: got 'triton' for tensors on cpu") for line in said[1::2])


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
        {"temperature": torch.tensor(1e4, device=device)},
        {"temperature": torch.tensor(-1.0, device=device), "alpha": 1.0},
        {"temperature": torch.tensor(math.nan, device=device), "alpha": 1.0},
        {"num_items": torch.tensor(-2, device=device)},
        {"num_items": torch.tensor(math.nan, device=device)},
        {"treatment": "bucket", "targets": sparse(torch.randn(6, 50), 0, 5).to(device)},
    ):
        given = {"targets": C.targets.to(device), **settings}
        out = kd_loss(C.logits.to(device), labels=good.to(device), impl="triton", **given)
        assert math.isnan(float(out.loss)), settings
    outside = changed(index=torch.tensor([0, 1, 2, 3, 4, 77])).to(device)
    assert math.isnan(float(kd_loss(C.logits.to(device), outside, good.to(device), impl="triton").loss))


@INTERPRETED
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # at a temperature of NaN: NumPy warns, a GPU's maximum is NaN
def test_unchecked_values_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, where values are not looked at: the kernels alone keep to their bounds."""
    from fastkd.kernels.loss import triton_impl as loss_triton

    monkeypatch.setattr(loss_triton, "values_are_checked", lambda device: False)
    on_device_values("cpu")


@pytest.mark.gpu
def test_unchecked_values_on_the_gpu() -> None:
    on_device_values("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_always_check(impl: str) -> None:
    with pytest.raises(KDError, match=r"targets\.ids: row 3"):
        kd_loss(C.logits.cuda(), with_value("ids", 3, 1, 50).to("cuda"), C.labels.cuda(), impl=impl)
    with pytest.raises(KDError, match=r"labels: row 0"):
        kd_loss(C.logits.cuda().double(), C.targets.to("cuda"), torch.full((6,), 99, device="cuda"))


@pytest.mark.gpu
def test_debug_names_row_and_argument_on_the_gpu() -> None:
    set_debug(True)
    try:
        with pytest.raises(KDError, match=r"targets\.ids: row 3"):
            kd_loss(C.logits.cuda(), with_value("ids", 3, 1, 50).to("cuda"), C.labels.cuda())
    finally:
        set_debug(False)


@INTERPRETED
def test_bad_logits_show_where_nothing_else_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where values are not checked: a row without entries and without a label, whose gradient is NaN."""
    pytest.importorskip("triton")
    from fastkd.kernels.loss import triton_impl

    monkeypatch.setattr(triton_impl, "values_are_checked", lambda device: False)
    empty = SparseTargets(
        ids=torch.zeros(1, 2, dtype=torch.int32), logprobs=torch.full((1, 2), -torch.inf), tail=torch.zeros(1, 1),
        outcomes=9, vocab_size=9, temperatures=(1.0,),
    )  # fmt: skip
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(1, 9)
        logits[0, 4] = value
        assert kd_loss(logits, empty, None, impl="triton").loss.isnan()
    assert kd_loss(torch.full((1, 9), -torch.inf), empty, None, impl="triton").loss.isnan()
    assert kd_loss(torch.zeros(1, 9), empty, None, impl="triton").loss == 0
    infinite = torch.tensor(torch.inf)
    assert kd_loss(torch.zeros(1, 9), empty, None, impl="triton", num_items=infinite).loss.isnan()
