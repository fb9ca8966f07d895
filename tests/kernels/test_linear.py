"""The fused head: gradients in hidden, weight and bias, what is frozen, what is tied, and what is given up."""

import warnings

import pytest
import torch
from cases import CELLS, Case, case
from test_matrix import DEVICE_ON

from fastkd import DistillationLoss, KDError, SparseTargets, kd_loss, linear_kd_loss
from fastkd.kernels.loss import linear


def head_case(n: int = 11, d: int = 8, v: int = 96, k: int = 6, draws: int = 4, dtype=torch.float32):
    """Hidden states, a weight and a bias whose logits are neither flat nor certain."""
    c = case("plain", n, v, k, draws)
    g = torch.Generator().manual_seed(11)
    hidden, weight, bias = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g), torch.randn(v, generator=g)
    return c, hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def grads(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Gradients on the CPU, in float64."""
    return [x.cpu().double() for x in torch.autograd.grad(loss, leaves)]


def close(found, expected, tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


@DEVICE_ON
@pytest.mark.parametrize(("divergence", "treatment"), CELLS)
def test_all_gradients(divergence: str, treatment: str, on) -> None:
    """Against the float64 reference, in chunks that do not divide N, with and without cap, scale and bias."""
    impl, device = on
    c, *tensors = head_case(n=3)
    settings = {"divergence": divergence, "treatment": treatment, "temperature": 2.0, "alpha": 0.4}
    targets, labels = c.targets.to(device), c.labels.to(device)
    for number, head in enumerate(({}, {"softcap": 3.0}, {"logit_scale": 0.6}, {"softcap": 4.0, "logit_scale": 1.7})):
        hidden, weight, bias = (x.to(device).requires_grad_() for x in tensors)
        for chunk, b in zip((2, 64) if number % 2 else (64, 2), (None, bias), strict=True):
            leaves = [hidden, weight] if b is None else [hidden, weight, bias]
            results = []
            for which in ("reference", impl):
                out = linear_kd_loss(
                    hidden, weight, targets, labels, bias=b, impl=which, chunk_tokens=chunk, **head, **settings
                )
                results.append((out, grads(out.loss * 3, *leaves)))
            (expected_out, expected), (out, found) = results
            close(found, expected)
            for x, y in zip(out, expected_out, strict=True):
                assert abs(float(x.detach()) - float(y.detach())) <= 1e-5 * max(1, abs(float(y.detach())))


@DEVICE_ON
def test_equals_the_loss_on_logits(on) -> None:
    impl, device = on
    c, hidden, weight, _ = head_case()
    hidden, weight = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    targets, labels = c.targets.to(device), c.labels.to(device)
    a = linear_kd_loss(hidden, weight, targets, labels, impl=impl, temperature=1.5)
    b = kd_loss(hidden @ weight.T, targets, labels, impl=impl, temperature=1.5)
    close(grads(a.loss, hidden, weight), grads(b.loss, hidden, weight))


@DEVICE_ON
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_requires_a_gradient(frozen: str, on) -> None:
    """A frozen head (LoRA on the body), a frozen body, evaluation."""
    impl, device = on
    c, hidden, weight, bias = head_case()
    hidden, weight, bias = (x.to(device).requires_grad_() for x in (hidden, weight, bias))
    targets, labels = c.targets.to(device), c.labels.to(device)
    full = linear_kd_loss(hidden, weight, targets, labels, bias=bias, impl=impl)
    d_hidden, d_weight = grads(full.loss, hidden, weight)
    h = hidden.detach() if frozen in ("hidden", "both") else hidden
    w = weight.detach() if frozen in ("weight", "both") else weight
    out = linear_kd_loss(h, w, targets, labels, bias=bias.detach(), impl=impl)
    assert torch.allclose(out.loss, full.loss, rtol=1e-6)
    if frozen == "both":
        assert not out.loss.requires_grad
        return
    leaf, expected = (w, d_weight) if frozen == "hidden" else (h, d_hidden)
    close(grads(out.loss, leaf), [expected])
    with torch.no_grad():
        assert not linear_kd_loss(hidden, weight, targets, labels, impl=impl).loss.requires_grad


@DEVICE_ON
def test_tied_embeddings(on) -> None:
    """The head's weight is the embedding too: both gradients arrive in it."""
    impl, device = on
    c, _, weight, _ = head_case()
    tokens = torch.arange(11, device=device) * 7 % 96
    found = []
    for which in ("reference", impl):
        w = weight.to(device).requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, w))
        out = linear_kd_loss(hidden, w, c.targets.to(device), c.labels.to(device), impl=which, temperature=2.0)
        found.append(grads(out.loss, w))
    close(*found)


@DEVICE_ON
def test_grad_weight_accumulates_across_micro_batches(on) -> None:
    impl, device = on
    c, hidden, weight, _ = head_case()
    hidden, weight = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    targets, labels = c.targets.to(device), c.labels.to(device)
    count = int((c.labels != -100).sum())
    whole = linear_kd_loss(hidden, weight, targets, labels, impl=impl, num_items=count)
    (expected,) = grads(whole.loss, weight)
    total = torch.zeros(weight.shape, device=device)
    for rows in (slice(0, 4), slice(4, 11)):
        out = linear_kd_loss(
            hidden[rows], weight, targets[rows], labels[rows], impl=impl, num_items=count, grad_weight=total
        )
        (out.loss * 8).backward()
    assert weight.grad is None
    close([total.cpu().double() / 8], [expected])
    both = [
        linear_kd_loss(hidden[r], weight, targets[r], labels[r], impl=impl, num_items=count, grad_weight=total).loss
        for r in (slice(0, 4), slice(4, 11))
    ]
    total.zero_()
    sum(both).backward()
    close([total.cpu().double()], [expected])
    assert hidden.grad is not None


@DEVICE_ON
def test_compact_targets_gather_before_the_head(on) -> None:
    """Rows without targets may hold anything: they never meet the head."""
    impl, device = on
    c, hidden, weight, _ = head_case()
    index = torch.tensor([9, 1, 4, 5, 0])
    rows = c.targets[index]
    hidden[2] = torch.nan
    h, w = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    compact = SparseTargets(**{**vars(rows), "index": index}).to(device)
    out = linear_kd_loss(h, w, compact, c.labels.to(device), impl=impl, chunk_tokens=2, temperature=2.0)
    found = grads(out.loss, h, w)
    h2 = hidden[index].to(device).requires_grad_()
    alone = linear_kd_loss(h2, w, rows.to(device), c.labels[index].to(device), impl=impl, temperature=2.0)
    d_h, d_w = grads(alone.loss, h2, w)
    expected = torch.zeros(11, 8, dtype=torch.float64)
    expected[index] = d_h
    close(found, [expected, d_w])


@DEVICE_ON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, on) -> None:
    """No worse than 1.1 times the eager head whose logits are upcast to float32; fp16 under a scale of 65536."""
    impl, device = on
    if impl == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where the hardware rounds")
    upstream = 65536.0 if dtype == torch.float16 else 1.0
    c, hidden, weight, _ = head_case(n=64, d=32, v=500, k=16, draws=8, dtype=dtype)
    weight = weight / 8
    targets, labels = c.targets.to(device), c.labels.to(device)
    settings = {"temperature": 2.0, "treatment": "bucket"}

    def gradients(which: str, h: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        h, w = h.to(device).requires_grad_(), w.to(device).requires_grad_()
        if which == "eager":
            loss = kd_loss((h @ w.T).float(), targets, labels, impl="torch", **settings).loss
        else:
            loss = linear_kd_loss(h, w, targets, labels, impl=which, chunk_tokens=16, **settings).loss
        return grads(loss * upstream, h, w)

    truth = gradients("reference", hidden.double(), weight.double())
    for mine, eager, exact in zip(
        gradients(impl, hidden, weight), gradients("eager", hidden, weight), truth, strict=True
    ):
        assert float((mine - exact).norm()) <= 1.1 * float((eager - exact).norm())


@DEVICE_ON
def test_autocast(on) -> None:
    """Matrix products in autocast's type; the weight's gradient arrives in the master weight's, never rounded to it."""
    impl, device = on
    c, hidden, weight, _ = head_case(n=32, d=16)
    h, w = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    targets, labels = c.targets.to(device), c.labels.to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_kd_loss(h, w, targets, labels, impl=impl, temperature=2.0)
    out.loss.backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32
    exact = linear_kd_loss(h, w, targets, labels, impl="reference", temperature=2.0)
    close([h.grad.cpu().double(), w.grad.cpu().double()], grads(exact.loss, h, w), 0.02)


@DEVICE_ON
def test_module_and_leading_dimensions(on) -> None:
    impl, device = on
    c, hidden, weight, _ = head_case(n=12)
    targets = c.targets.to(device)
    labels = c.labels.to(device).view(3, 4)
    module = DistillationLoss(alpha=0.2, temperature=2.0, impl=impl)
    assert "temperature=2.0" in repr(module)
    h, w = hidden.to(device).view(3, 4, 8), weight.to(device)
    a, b = module.linear(h, w, targets, labels), module(h @ w.T, targets, labels)
    assert torch.allclose(a.loss, b.loss, rtol=1e-5)


@DEVICE_ON
def test_empty_and_all_ignored(on) -> None:
    impl, device = on
    c, hidden, weight, _ = head_case()
    for rows, labels in ((slice(0, 0), c.labels[:0]), (slice(0, 11), torch.full((11,), -100))):
        h, w = hidden[rows].to(device).requires_grad_(), weight.to(device).requires_grad_()
        out = linear_kd_loss(h, w, c.targets[rows].to(device), labels.to(device), impl=impl)
        out.loss.backward()
        assert float(out.loss.detach()) == 0.0
        assert not w.grad.any()
        assert h.grad.shape == h.shape
        assert not h.grad.any()


@DEVICE_ON
def test_heavy_rows_in_float16(on) -> None:
    """Weights of 1e4 exceed what float16 holds of a logit gradient: they are taken relative to the heaviest."""
    impl, device = on
    c, hidden, weight, _ = head_case(n=12, dtype=torch.float16)
    weight = weight / 4
    weights = torch.linspace(1.0, 3e4, 12)
    mask = torch.arange(12) != 5
    weights[5] = torch.inf  # does not count, and must not be the heaviest
    index = torch.tensor([9, 1, 5, 4, 0])
    compact = SparseTargets(**{**vars(c.targets[index]), "index": index})
    for targets in (c.targets, compact):
        found = []
        for which, dtype in ((impl, torch.float16), ("reference", torch.float64)):
            h, w = hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_()
            settings = {"weights": weights.to(device), "mask": mask.to(device), "impl": which, "chunk_tokens": 5}
            out = linear_kd_loss(h, w, targets.to(device), c.labels.to(device), temperature=2.0, **settings)
            found.append(grads(out.loss * 2.0**-12, h, w))
        for mine, exact in zip(*found, strict=True):
            assert bool(mine.isfinite().all())
            assert float((mine - exact).norm()) <= 3e-3 * float(exact.norm())


@DEVICE_ON
def test_hidden_rows_that_do_not_count_may_hold_anything(on) -> None:
    """0 * NaN is NaN: a row that is ignored, masked or without targets must not reach the weight's gradient."""
    impl, device = on
    c, hidden, weight, bias = head_case()
    mask = torch.arange(11) != 6
    index = torch.tensor([9, 1, 2, 6, 0])
    compact = SparseTargets(**{**vars(c.targets[index]), "index": index})
    spoiled = hidden.clone()
    spoiled[2] = torch.nan  # its label is ignored
    spoiled[6] = torch.inf  # not in the mask
    spoiled[10] = torch.nan  # not in the index
    for targets in (c.targets, compact):
        if targets is c.targets:
            mask[10] = False
        for which in (impl, "reference"):
            found = []
            for rows in (hidden, spoiled):
                leaves = [x.to(device).requires_grad_() for x in (rows.clone(), weight.clone(), bias.clone())]
                h, w, b = leaves
                settings = {"mask": mask.to(device), "impl": which, "chunk_tokens": 4, "bias": b}
                out = linear_kd_loss(h, w, targets.to(device), c.labels.to(device), **settings)
                found.append([out.loss.detach().cpu(), *grads(out.loss, *leaves)])
            assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@DEVICE_ON
def test_no_width_at_all(on) -> None:
    """D = 0: all logits are the bias, or 0."""
    impl, device = on
    c = head_case()[0]
    targets, labels = c.targets.to(device), c.labels.to(device)
    for shape in ((11,), (11, 1)):
        h, w = torch.zeros(*shape, 0, device=device, requires_grad=True), torch.zeros(96, 0, device=device)
        out = linear_kd_loss(h, w.requires_grad_(), targets, labels.view(shape), impl=impl)
        out.loss.backward()
        flat = kd_loss(torch.zeros(11, 96, device=device), targets, labels, impl=impl)
        assert torch.allclose(out.loss, flat.loss)
        assert h.grad.shape == h.shape


def test_float64_stays_float64() -> None:
    """The reference's gradients are not rounded on the way out, and autocast leaves float64 alone, as torch's does."""
    c, *tensors = head_case(dtype=torch.float64)
    found = []
    for which in ("reference", "torch"):
        for autocast in (False, True):
            leaves = [x.clone().requires_grad_() for x in tensors]
            h, w, b = leaves
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = linear_kd_loss(h, w, c.targets, c.labels, bias=b, impl=which, temperature=2.0)
            out.loss.backward()
            assert all(x.grad.dtype == torch.float64 for x in leaves)
            found.append([x.grad for x in leaves])
    for others in found[1:]:
        close(others, found[0], 1e-12)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(KDError, match=r"weight: got torch\.float64 on cpu; expected torch\.float32"),
    ):
        linear_kd_loss(tensors[0].float(), tensors[1], c.targets, c.labels)


def test_weight_gradient_is_accumulated_in_float32() -> None:
    """Many chunks of bf16: the error stays that of one rounding, where a bf16 accumulator's would grow."""
    c, hidden, weight, _ = head_case(n=512, d=4, v=64, k=4, draws=0, dtype=torch.bfloat16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    exact = linear_kd_loss(h.double(), w.double(), c.targets, c.labels, impl="reference")
    (d_exact,) = grads(exact.loss, w)
    errors = []
    for chunk in (512, 4):
        (d,) = grads(linear_kd_loss(h, w, c.targets, c.labels, impl="torch", chunk_tokens=chunk).loss, w)
        errors.append(float((d - d_exact).norm()))
    assert errors[1] <= 1.2 * errors[0]


def test_second_backward_and_frozen_accumulator() -> None:
    c, hidden, weight, _ = head_case()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_kd_loss(h, w, c.targets, c.labels)
    out.loss.backward(retain_graph=True)
    with pytest.raises(KDError, match="second call"):
        out.loss.backward()
    with pytest.raises(KDError, match="grad_weight"):
        linear_kd_loss(h, w.detach(), c.targets, c.labels, grad_weight=torch.zeros(96, 8))


@pytest.mark.parametrize(
    ("accumulator", "says"),
    [
        (torch.zeros(96, 8, dtype=torch.float64), "torch.float64; "),
        (torch.zeros(96, 9), "got .96, 9."),
        (torch.zeros(96, 8, device="meta"), "got on meta, weight on cpu"),
        (torch.zeros(96, 8, requires_grad=True), "requires a gradient"),
        (torch.zeros(1, 8).expand(96, 8), "share no memory"),
        (torch.zeros(96 + 7).as_strided((96, 8), (1, 1)), "share no memory"),
        ([0.0], "got .*list"),
        (torch.inference_mode()(lambda: torch.zeros(96, 8))(), "inference_mode"),
    ],
)
def test_what_is_no_accumulator(accumulator, says: str) -> None:
    c, hidden, weight, _ = head_case()
    with pytest.raises(KDError, match=rf"grad_weight: .*{says}"):
        linear_kd_loss(hidden, weight.requires_grad_(), c.targets, c.labels, grad_weight=accumulator)


def test_an_accumulator_may_be_strided() -> None:
    c, hidden, weight, _ = head_case()
    totals = torch.zeros(96, 8), torch.zeros(8, 96).T, torch.zeros(96, 20)[:, ::2][:, :8]
    for total in totals:
        linear_kd_loss(hidden, weight.requires_grad_(), c.targets, c.labels, grad_weight=total).loss.backward()
    assert totals[0].any()
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


def test_peak_memory_is_one_chunk() -> None:
    """Beyond inputs and gradients: about one chunk of logits, not `[N, V]`."""
    n, d, v = 256, 16, 4096
    c: Case = case("plain", n, v, 8)
    h, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        linear_kd_loss(h, w, c.targets, c.labels, chunk_tokens=16, temperature=2.0).loss.backward()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    returned = (h.numel() + w.numel()) * 4
    assert peak - returned < 6 * 16 * v * 4 + (1 << 18)


@pytest.mark.parametrize("refuses", [(), ("addmm",), ("addmm", "mm")], ids=["all", "torch 2.8", "none"])
def test_the_weights_gradient_is_added_as_the_build_can(monkeypatch: pytest.MonkeyPatch, refuses: tuple) -> None:
    """`addmm(out_dtype=float32)` exists in torch 2.8 and refuses unequal types: what works is tried, once a device."""
    calls: list[str] = []

    def emulate(name: str):
        original = getattr(torch, name)

        def function(*args: torch.Tensor, out_dtype: torch.dtype | None = None, **more):
            if out_dtype is None:
                return original(*args, **more)
            calls.append(name)
            assert args[-1].dtype == args[-2].dtype == torch.bfloat16
            if name in refuses:
                raise RuntimeError(f"{name}: self and mat2 must have the same dtype")
            return original(*(x.to(out_dtype) for x in args), **more)

        return function

    for name in ("addmm", "mm"):
        monkeypatch.setattr(torch, name, emulate(name))
    monkeypatch.setattr(linear, "wider_product", linear.try_wider_product)  # as on a GPU
    monkeypatch.setattr(linear, "MM_ROWS", 40)
    linear.try_wider_product.cache_clear()
    c, hidden, weight, _ = head_case(dtype=torch.bfloat16)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for chunk in (4, 5):
            h, w = hidden.requires_grad_(), weight.requires_grad_()
            found += grads(linear_kd_loss(h, w, c.targets, c.labels, impl="torch", chunk_tokens=chunk).loss, w)
    linear.try_wider_product.cache_clear()
    monkeypatch.undo()
    expected = grads(linear_kd_loss(h, w, c.targets, c.labels, impl="torch", chunk_tokens=4).loss, w)[0]
    for one in found:
        assert float((one - expected).norm()) <= (1e-2 if len(refuses) == 2 else 1e-3) * float(expected.norm())
    assert calls.count("addmm") == (1 + 3 + 2 if not refuses else 1)  # ten rows count
    assert [str(w.message).count("cannot add a torch.bfloat16") for w in caught] == [1] * bool(refuses)


@DEVICE_ON
def test_one_chunk_gives_the_weights_gradient_without_a_float32_sum(on) -> None:
    """In bfloat16, where one product adds up all rows: as exact as the sum in float32, rounded once by the product."""
    impl, device = on
    c, hidden, weight, _ = head_case(n=64, d=32, v=500, k=16, draws=8, dtype=torch.bfloat16)
    targets, labels = c.targets.to(device), c.labels.to(device)
    h, w = hidden.to(device).requires_grad_(), weight.to(device).div(8).requires_grad_()
    # by 3, a product in bfloat16 is rounded a second time (the interpreter truncates it)
    upstream = 1.0 if (impl, device) == ("triton", "cpu") else 3.0
    truth = grads(linear_kd_loss(h, w, targets, labels, impl="reference", temperature=2.0).loss * upstream, w)[0]
    seen: list[torch.dtype] = []
    original = linear.linear_kd_loss_chunks

    def watched(*args, **more):
        found = original(*args, **more)
        seen.append(found[3][1].dtype)
        return found

    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.kernels.loss.ops.linear_kd_loss_chunks", watched)
        patch.setattr(linear, "LEAST_UNSPLIT", 0)
        for chunk in (64, 32):
            loss = linear_kd_loss(h, w, targets, labels, impl=impl, temperature=2.0, chunk_tokens=chunk).loss
            errors.append(float((grads(loss * upstream, w)[0] - truth).norm() / truth.norm()))
        total = torch.zeros(w.shape, device=device)
        linear_kd_loss(h, w, targets, labels, impl=impl, grad_weight=total).loss.backward()
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    assert errors[0] <= (1.2 if upstream == 3.0 else 1.02) * errors[1]
    assert errors[1] < 0.01


def test_a_cpu_multiplies_no_bfloat16_for_the_weights_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    types, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args: (types.extend(x.dtype for x in args), original(*args))[1])
    gradient, hidden = (torch.randn(6, width).bfloat16() for width in (20, 4))
    total = torch.full((20, 4), torch.nan, dtype=torch.bfloat16)
    linear.add_outer_product_(total, gradient, hidden, first=True)
    assert types == [torch.float32] * 2
    assert torch.equal(total, original(gradient.float().t(), hidden.float()).bfloat16())


def test_chunks_by_the_memory_that_is_free_and_the_sums_traffic() -> None:
    gpu, v = torch.device("cuda"), 128256

    def chunk(rows: int, hidden: int) -> int:
        return linear.default_chunk(gpu, v, 2, rows=rows, longer=hidden)

    assert [chunk(8192, d) for d in (0, 576, 896, 2048, 4096)] == [2048, 2048, 2816, 4096, 4096]
    assert linear.default_chunk(gpu, 49152, 2, rows=8192, longer=576) == 2816  # by the 32 MB
    assert chunk(100, 4096) == 2048  # a buffer has no more rows than there are
    assert chunk(1 << 20, 16384) == linear.LONGEST_CHUNK
    for rows in (1, 3000, 8192, 16384, 100_000):
        for hidden in (64, 576, 2048, 4096, 12288):
            length, weight = chunk(rows, hidden), torch.empty(v, hidden, device="meta", dtype=torch.bfloat16)
            assert length % 128 == 0
            once = linear.weight_gradient_type(weight, torch.bfloat16, rows, 0) == torch.bfloat16
            # in the forward the sum in float32 is there, and the gradient that is returned is not yet
            beyond = 2 * min(rows, length) * v + 4 * v * hidden - 2 * v * hidden
            assert (2 * rows * v if once else beyond) <= 2 * 2048 * v + 4 * v * hidden + 2**25
    small = torch.empty(1000, 64, device="meta", dtype=torch.bfloat16)
    assert linear.weight_gradient_type(small, torch.bfloat16, 100, 0) == torch.float32
    narrow = torch.empty(v, 4096, device="meta", dtype=torch.float16)
    assert linear.weight_gradient_type(narrow, torch.float16, 100, 0) == torch.float32
    assert linear.weight_gradient_type(narrow.float(), torch.bfloat16, 100, 0) == torch.float32  # autocast


def test_rows_of_the_buffer_begin_at_128_bytes() -> None:
    """Whatever the width: an odd leading dimension costs the products their vector loads, and the kernels too."""
    pytest.importorskip("triton")
    from fastkd.kernels.loss.triton_impl import INTERPRETED, TritonRows

    if not INTERPRETED:
        pytest.skip("triton compiles for the GPU in this process")
    c, hidden, weight, bias = head_case(v=97)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    strides, original, found = [], TritonRows.loss_, []

    def watched(self, x_CV: torch.Tensor, first: int) -> None:
        strides.append(x_CV.stride())
        original(self, x_CV, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonRows, "loss_", watched)
        for impl in ("triton", "reference"):
            out = linear_kd_loss(hidden, weight, c.targets, c.labels, bias=bias, impl=impl, chunk_tokens=4)
            found.append(grads(out.loss, *leaves))
    assert strides == [(128, 1)] * 3
    close(*found)
