"""The whole matrix: value and gradient of every implementation against the dense float64 oracle."""

import itertools
import math

import pytest
import torch
from cases import CELLS, KINDS, Case, case, dense_loss, peak_bytes

from fastkd import KDError, SparseTargets, kd_loss, linear_kd_loss
from fastkd.kernels.treatment import SAMPLED_REACH

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the GPU here, not interpreted")
DEVICE_ON = pytest.mark.parametrize(
    "on",
    [
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(
            ("triton", "cpu"),
            id="triton-interpreted",
            marks=INTERPRETED,
        ),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ],
)
IMPLS_ON_CPU = pytest.mark.parametrize("impl", ["torch", "reference", pytest.param("triton", marks=INTERPRETED)])


def run(c: Case, on: tuple[str, str], upstream: float = 1.0, dtype: torch.dtype = torch.float32, **settings):
    """Loss and gradient of one implementation, on the CPU."""
    impl, device = on
    if impl == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU here, not interpreted")
    leaf = c.logits.detach().clone().to(device, dtype).requires_grad_()
    inplace = settings.pop("inplace", False)
    given = leaf.clone() if inplace else leaf
    out = kd_loss(given, c.targets.to(device), c.labels.to(device), impl=impl, inplace=inplace, **settings)
    out.loss.backward(torch.tensor(upstream, device=device))
    return out.loss.detach().cpu(), leaf.grad.cpu()


def oracle(c: Case, upstream: float = 1.0, dtype: torch.dtype = torch.float64, logits=None, **settings):
    """Loss and gradient by autograd on the dense loss, in `dtype`; in float32 it is the eager loss."""
    mix = settings.pop("beta", 0.5) if settings["divergence"] == "jsd" else settings.pop("skew", 0.1)
    leaf = (c.logits if logits is None else logits).detach().clone().to(dtype).requires_grad_()
    t = float(settings.pop("temperature"))
    loss = dense_loss(leaf, c.targets, c.labels, alpha=settings.pop("alpha", 0.5), temperature=t, mix=mix, **settings)
    loss.backward(torch.tensor(upstream, dtype=dtype))
    return loss.detach(), leaf.grad


def agree(c: Case, found, expected, upstream: float, temperature: float, slack: float = 1.0) -> None:
    """float32: loss within 1e-5 max(1, |ref|), each row's gradient within 1e-5 (|p| + |q|), times what scales it."""
    (loss, grad), (ref, ref_grad) = found, expected
    assert abs(float(loss) - float(ref)) <= 1e-5 * max(1.0, abs(float(ref))) * slack
    z = c.logits.double()
    p = z.softmax(1).norm(dim=1) + z.div(temperature).softmax(1).norm(dim=1)
    q = c.targets.logprobs.double().exp().norm(dim=1)
    count = max(int((c.labels != -100).sum()), 1)
    allowed = 1e-5 * (p + q) * max(1.0, temperature) * upstream / count
    assert bool(((grad.double() - ref_grad).norm(dim=1) <= allowed).all())


@DEVICE_ON
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("divergence", "treatment"), CELLS)
def test_cells(divergence: str, treatment: str, kind: str, on) -> None:
    """Every divergence and treatment x kinds of student x T on the grid, off it, as a tensor x upstream x in place."""
    if divergence == "tvd" and kind == "equal":
        pytest.skip("TVD has no gradient where student and teacher agree: every subgradient is right")
    grid = list(
        enumerate(
            [
                (1.0, False, 1.0, False),
                (1.5, False, 1024.0, True),
                (2.0, True, 1024.0, False),
                (2.0, False, 1.0, True),
                (3.3, False, 1.0, False),
                (3.3, True, 1024.0, True),
                (4.0, False, 1.0, False),
                (20.0, False, 1.0, False),
            ]
        )
    )
    if on == ("triton", "cpu"):  # interpreting is slow: all of them over the kinds and cells
        grid = grid[(KINDS.index(kind) + CELLS.index((divergence, treatment))) % 3 :: 3]
    for number, (t, tensor, upstream, inplace) in grid:
        # three rows: a label in S, one off it, one ignored
        c = case(kind, 3, 100, 7, 6, seed=number)
        settings = {"divergence": divergence, "treatment": treatment, "alpha": 0.3}
        temperature = torch.tensor(t, device=on[1]) if tensor else t
        found = run(c, on, upstream, inplace=inplace, temperature=temperature, **settings)
        expected = oracle(c, upstream, temperature=float(torch.tensor(t)) if tensor else t, **settings)
        # float32 leaves 1e-7 in D and T^2 times that in the loss: beyond T = 4 the bound grows with it
        agree(c, found, expected, upstream, t, slack=max(1.0, t * t / 16))


def textbook(z_NV, teacher_NV, t: float, divergence: str, mix: float, head_NK) -> torch.Tensor:
    """T^2 D straight from the definitions on probabilities; where S is not all, what is off it is one outcome."""
    p, q = (z_NV / t).softmax(1), (teacher_NV / t).softmax(1)
    if head_NK.shape[1] < z_NV.shape[1]:
        off = torch.ones_like(p).scatter(1, head_NK, 0.0)
        p, q = (torch.cat([x.gather(1, head_NK), (x * off).sum(1, keepdim=True)], 1) for x in (p, q))

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum(1)

    if divergence == "forward_kl":
        rows = kl(q, p)
    elif divergence == "reverse_kl":
        rows = kl(p, q)
    elif divergence == "jsd":
        m = mix * q + (1 - mix) * p
        rows = mix * kl(q, m) + (1 - mix) * kl(p, m)
    elif divergence == "skew_kl":
        rows = kl(q, mix * q + (1 - mix) * p)
    else:
        rows = 0.5 * (p - q).abs().sum(1)
    return t * t * rows.mean()


@IMPLS_ON_CPU
@pytest.mark.parametrize("k", [40, 7], ids=["whole", "bucket"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"])
def test_textbook_definitions(divergence: str, k: int, impl: str) -> None:
    """Value and gradient, with nothing of the code under test: in float64 to 1e-9 where an implementation has it."""
    g = torch.Generator().manual_seed(8)
    teacher, student = (torch.randn(5, 40, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    log_q = teacher.log_softmax(1)
    head = log_q.argsort(1, descending=True)[:, :k]
    rest = log_q.scatter(1, head, -math.inf)
    targets = SparseTargets(
        ids=head,
        logprobs=log_q.gather(1, head),
        tail=torch.stack([(rest / t).logsumexp(1) for t in (1.0, 2.0)], 1),
        outcomes=40 - k,
        vocab_size=40,
        temperatures=(1.0, 2.0),
    )
    dtype, tolerance = (torch.float32, 1e-5) if impl == "triton" else (torch.float64, 1e-9)
    for t in (1.0, 2.0):
        for mix in (0.5, 0.2):
            exact = student.clone().requires_grad_()
            expected = textbook(exact, teacher, t, divergence, mix, head)
            expected.backward()
            leaf = student.to(dtype, copy=True).requires_grad_()
            settings = {"divergence": divergence, "beta": mix, "skew": mix, "temperature": t, "impl": impl}
            loss = kd_loss(leaf, targets, None, **settings).loss
            loss.backward()
            # the loss itself is float32 whatever the logits are
            assert abs(float(loss.detach()) - float(expected.detach())) <= max(tolerance, 1e-6)
            assert float((leaf.grad.double() - exact.grad).abs().max()) <= tolerance


SIZES = [
    (10, 0, 4),
    (10, 1, 0),
    (10, 7, 2),
    (10, 64, 0),
    (1000, 0, 16),
    (1000, 1, 3),
    (1000, 64, 16),
    (1000, 128, 0),
    (49152, 64, 16),
    (49152, 128, 0),
    (50257, 7, 0),
    (50257, 0, 50),
    (151936, 64, 16),
    (151936, 1, 0),
]


@DEVICE_ON
@pytest.mark.parametrize(("v", "k", "draws"), SIZES)
def test_sizes(v: int, k: int, draws: int, on) -> None:
    """Widths and heads, the awkward ones included."""
    c = case("plain", 3, v, k, draws, seed=v + k)
    slow = on == ("triton", "cpu") and v > 10_000
    for divergence, treatment in CELLS[v % 3 :: 3] if slow and k else CELLS:
        if k == 0 and (divergence, treatment) not in (("forward_kl", "sampled"), ("forward_kl", "auto")):
            continue  # nothing else takes a row of draws alone
        t = 1.3 if treatment == "auto" else 2.0
        settings = {"divergence": divergence, "treatment": treatment, "temperature": t}
        agree(c, run(c, on, **settings), oracle(c, **settings), 1.0, t)


@DEVICE_ON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("divergence", "treatment"), CELLS)
def test_half_precision(divergence: str, treatment: str, dtype: torch.dtype, on) -> None:
    """No worse than 1.1 times an eager op that upcasts its logits to float32; fp16 under GradScaler's 65536."""
    upstream = 65536.0 if dtype == torch.float16 else 1.0
    # the interpreter truncates to bfloat16 where the hardware rounds: so must what it is compared with
    truncates = dtype == torch.bfloat16 and on == ("triton", "cpu")
    ours, eager = [], []
    grid = list(itertools.product(("plain", "flat", "peaked", "certain"), (1.0, 2.0, 3.3), (False, True)))
    for kind, t, inplace in grid[
        :: 5 if on == ("triton", "cpu") else 1
    ]:  # interpreting is slow: every kind, T and place
        c = case(kind, 3, 1000, 16, 8)
        c.logits = c.logits.to(dtype)
        settings = {"divergence": divergence, "treatment": treatment, "temperature": t}
        _, truth = oracle(c, upstream, **settings)
        _, grad = run(c, on, upstream, dtype, inplace=inplace, **settings)
        upcast = c.logits.clone().requires_grad_()
        _, grad32 = oracle(c, upstream, torch.float32, logits=upcast.detach(), **settings)
        assert grad.dtype == dtype
        ours.append((grad.double() - truth).norm() / truth.norm())
        rounded = (grad32.view(torch.int32) & ~0xFFFF).view(torch.float32) if truncates else grad32.to(dtype)
        eager.append((rounded.double() - truth).norm() / truth.norm())
    for mine, theirs in zip(ours, eager, strict=True):
        assert float(mine) <= 1.1 * float(theirs) + 1e-6


@DEVICE_ON
def test_all_rows_ignored_and_none(on) -> None:
    c = case("plain", 4, 50, 5)
    c.labels[:] = -100
    loss, grad = run(c, on, temperature=2.0)
    assert float(loss) == 0.0
    assert not grad.any()
    empty = Case(c.logits[:0], c.targets[:0], c.labels[:0])
    loss, grad = run(empty, on)
    assert float(loss) == 0.0
    assert grad.shape == (0, 50)


@DEVICE_ON
def test_ignored_rows_may_hold_anything(on) -> None:
    """Logits and targets, too: what does not count is neither used nor checked."""
    c = case("plain", 5, 60, 4, 3)
    clean = run(c, on, temperature=2.0)
    c.logits[2] = math.nan
    junk = {name: getattr(c.targets, name).clone() for name in ("ids", "logprobs", "tail", "outcomes", "draws")}
    for name, value in (("ids", 10**6), ("logprobs", math.nan), ("tail", math.nan), ("outcomes", -4), ("draws", -1)):
        junk[name][2] = value
    c.targets = type(c.targets)(**{**vars(c.targets), **junk})
    for impl in (on[0], "reference"):
        loss, grad = run(c, (impl, on[1]), temperature=2.0)
        assert torch.allclose(loss, clean[0], rtol=1e-6 if impl == "reference" else 0)
        assert torch.allclose(grad, clean[1], atol=1e-6 if impl == "reference" else 0)


@DEVICE_ON
def test_alpha_one_is_cross_entropy_and_zero_is_the_soft_loss(on) -> None:
    c = case("certain", 6, 300, 5)
    for alpha in (1.0, torch.tensor(1.0, device=on[1])):
        loss, grad = run(c, on, alpha=alpha, temperature=2.0)
        leaf = c.logits.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf, c.labels)
        expected.backward()
        expected = expected.detach()
        assert abs(float(loss) - float(expected)) <= 1e-5 * max(1, float(expected))
        assert (grad.double() - leaf.grad).norm() < 1e-5
    impl, device = on
    soft = kd_loss(c.logits.to(device), c.targets.to(device), None, impl=impl, temperature=2.0, alpha=0.7)
    assert math.isnan(float(soft.hard))
    assert torch.equal(soft.loss, soft.soft)


@DEVICE_ON
def test_an_infinite_part_with_factor_zero_adds_nothing(on) -> None:
    """A label that the student has ruled out, and soft targets alone: finite; and the other way round."""
    impl, device = on
    c = case("plain", 4, 40, 5)
    outside = next(token for token in range(40) if not (c.targets.ids == token).any())
    inside = int(c.targets.ids[0, 0])
    for which, masked, labels, alpha in (
        *((which, outside, torch.full((4,), outside), 0.0) for which in (impl, "reference")),
        *((which, inside, torch.full((4,), outside), 1.0) for which in (impl, "reference")),
    ):
        leaf = c.logits.detach().clone()
        leaf[:, masked] = -math.inf
        leaf = leaf.to(device).requires_grad_()
        out = kd_loss(leaf, c.targets.to(device), labels.to(device), alpha=alpha, impl=which)
        out.loss.backward()
        assert math.isinf(float(out.soft if alpha else out.hard))
        assert math.isfinite(float(out.loss.detach()))
        assert bool(leaf.grad.isfinite().all())


@DEVICE_ON
def test_weights_mask_num_items(on) -> None:
    impl, device = on
    c = case("plain", 8, 90, 6, 4)
    g = torch.Generator().manual_seed(5)
    weights, mask = torch.rand(8, generator=g), torch.rand(8, generator=g) > 0.3
    for labels in (c.labels, None):
        for num_items in (None, 0, 17, torch.tensor(23)):
            leaf = c.logits.detach().clone().to(device).requires_grad_()
            out = kd_loss(
                leaf,
                c.targets.to(device),
                None if labels is None else labels.to(device),
                weights=weights.to(device),
                mask=mask.to(device),
                num_items=num_items.to(device) if isinstance(num_items, torch.Tensor) else num_items,
                temperature=2.0,
                impl=impl,
                treatment="sampled",
            )
            out.loss.backward()
            dense = c.logits.double().requires_grad_()
            expected = dense_loss(
                dense,
                c.targets,
                labels,
                alpha=0.5,
                temperature=2.0,
                divergence="forward_kl",
                treatment="sampled",
                mix=0.5,
                mask=mask,
                weights=weights,
                num_items=None if num_items is None else float(num_items),
            )
            expected.backward()
            assert abs(float(out.loss.detach()) - float(expected.detach())) <= 1e-5 * max(
                1, abs(float(expected.detach()))
            )
            assert (leaf.grad.cpu().double() - dense.grad).norm() < 1e-5


@DEVICE_ON
def test_a_wider_student(on) -> None:
    """Columns beyond the teacher's vocabulary are outcomes whose q is 0."""
    c = case("plain", 5, 70, 6, 4)
    extra = torch.randn(5, 9, generator=torch.Generator().manual_seed(3))
    wide = Case(torch.cat([c.logits, extra], 1), c.targets, c.labels)
    for divergence, treatment in CELLS:
        settings = {"divergence": divergence, "treatment": treatment, "temperature": 2.0}
        agree(wide, run(wide, on, **settings), oracle(wide, **settings), 1.0, 2.0)


@DEVICE_ON
def test_strides_and_leading_dimensions(on) -> None:
    """A slice of a longer buffer, `[B, L, V]`, transposed storage: no copy is asked of the caller."""
    impl, device = on
    c = case("plain", 6, 80, 5)
    expected_loss, expected = run(c, on, temperature=2.0)
    buffer = torch.full((2, 4, 96), 7.0, device=device)
    view = buffer[:, :3, 5:85]
    view.copy_(c.logits.view(2, 3, 80))
    for source in (view, c.logits.to(device).view(2, 3, 80).transpose(0, 2).contiguous().transpose(0, 2)):
        for inplace in (False, True):
            leaf = source.detach().clone(memory_format=torch.preserve_format) if inplace else source.detach()
            if inplace and source is view:
                leaf = buffer.clone()[:, :3, 5:85]
            leaf.requires_grad_()
            out = kd_loss(
                leaf,
                c.targets.to(device),
                c.labels.to(device).view(2, 3),
                temperature=2.0,
                impl=impl,
                inplace=inplace,
            )
            out.loss.backward()
            assert torch.equal(out.loss.detach().cpu(), expected_loss)
            assert torch.equal(leaf.grad.cpu().reshape(6, 80), expected)
            if inplace:
                assert torch.equal(leaf.detach().cpu().reshape(6, 80), expected)
    assert float(buffer[:, 3].mean()) == 7.0


@DEVICE_ON
def test_four_dimensions_that_do_not_collapse(on) -> None:
    """`[A, B, L, V]` cut out of something larger: two strides do not reach every row."""
    impl, device = on
    c = case("plain", 24, 80, 5)
    expected_loss, expected = run(c, on, temperature=2.0)
    for dtype in (torch.float32, torch.float16):
        for inplace in (False, True):
            buffer = torch.full((2, 4, 5, 90), 7.0, device=device, dtype=dtype)
            leaf = buffer[:, :3, :4, 3:83]
            leaf.copy_(c.logits.view(2, 3, 4, 80))
            leaf = leaf.detach().requires_grad_()
            with pytest.raises(RuntimeError, match="view"):
                leaf.view(6, 4, 80)
            labels = c.labels.to(device).view(2, 3, 4)
            out = kd_loss(leaf, c.targets.to(device), labels, temperature=2.0, impl=impl, inplace=inplace)
            out.loss.backward()
            tolerance = 0.0 if dtype == torch.float32 else 1e-2
            assert torch.allclose(out.loss.detach().cpu(), expected_loss, rtol=tolerance)
            assert torch.allclose(leaf.grad.cpu().reshape(24, 80).float(), expected, atol=tolerance)
            if inplace:
                assert torch.equal(leaf.detach(), leaf.grad)
            assert float(buffer[:, 3].float().mean()) == float(buffer[..., :3].float().mean()) == 7.0


@DEVICE_ON
def test_unused_places_may_hold_anything(on) -> None:
    """Their ids and draws are never read through, in a row without any entry neither."""
    c = case("plain", 6, 40, 5, 3)
    c.targets.logprobs[3] = -math.inf
    expected = run(c, on, temperature=2.0)
    unused = c.targets.logprobs == -math.inf
    for junk in (2**30, -7):
        ids, draws = c.targets.ids.masked_fill(unused, junk), c.targets.draws.masked_fill(unused, junk)
        other = Case(c.logits, type(c.targets)(**{**vars(c.targets), "ids": ids, "draws": draws}), c.labels)
        for found, wanted in zip(run(other, on, temperature=2.0), expected, strict=True):
            assert torch.equal(found, wanted)


@DEVICE_ON
def test_shared_memory_is_refused_in_place(on) -> None:
    """Rows expanded from one would write their gradients over each other."""
    impl, device = on
    c = case("plain", 6, 40, 5)
    leaf = c.logits[:1].to(device).requires_grad_()
    args = c.targets.to(device), c.labels.to(device)
    with pytest.raises(KDError, match=r"logits: got strides \(40, 0\)|logits: got strides \(0, 1\)"):
        kd_loss((leaf * 1).expand(6, 40), *args, impl=impl, inplace=True)
    kd_loss((leaf * 1).expand(6, 40), *args, impl=impl).loss.backward()
    assert leaf.grad.any()
    with torch.no_grad():
        kd_loss((leaf * 1).expand(6, 40), *args, impl=impl, inplace=True)


@DEVICE_ON
def test_compact_targets(on) -> None:
    """Targets of some positions, with an index: the others do not count, and their gradient is 0."""
    impl, device = on
    c = case("plain", 9, 75, 5, 4)
    index = torch.tensor([7, 0, 3, 4])
    rows = c.targets[index]
    compact = type(rows)(**{**vars(rows), "index": index})
    for inplace in (False, True):
        leaf = c.logits.detach().clone().to(device).requires_grad_()
        given = leaf.clone() if inplace else leaf
        out = kd_loss(
            given,
            compact.to(device),
            c.labels.to(device),
            temperature=2.0,
            impl=impl,
            inplace=inplace,
            treatment="sampled",
        )
        out.loss.backward()
        alone = Case(c.logits[index], rows, c.labels[index])
        loss, grad = run(alone, on, temperature=2.0, treatment="sampled")
        expected = torch.zeros_like(c.logits)
        expected[index] = grad
        assert torch.allclose(out.loss.detach().cpu(), loss, atol=1e-6)
        assert torch.allclose(leaf.grad.cpu(), expected, atol=1e-7)


@DEVICE_ON
def test_auto_follows_a_tensor_temperature(on) -> None:
    """auto takes the draws up to 1.5 T_d; with a tensor that is decided where the tensor is."""
    device = on[1]
    c = case("plain", 4, 64, 6, 8)
    for t in (1.0, SAMPLED_REACH, 1.6, 2.0):
        means = "sampled" if t <= SAMPLED_REACH else "bucket"
        for temperature in (t, torch.tensor(t, device=device)):
            found = run(c, on, temperature=temperature, treatment="auto")
            agree(c, found, oracle(c, temperature=t, divergence="forward_kl", treatment=means), 1.0, t)


@DEVICE_ON
def test_bitwise_deterministic(on) -> None:
    c = case("plain", 16, 1000, 16, 8)
    first = run(c, on, temperature=3.3)
    for _ in range(3):
        again = run(c, on, temperature=3.3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@DEVICE_ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_evaluation_does_no_gradient_work(dtype: torch.dtype, on, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, inference_mode, or on logits without a gradient: the same loss, the logits untouched even where
    they are given up, nothing saved, and no memory for a gradient."""
    from fastkd.kernels.loss import torch_impl

    impl, device = on
    rows = 16 if on == ("triton", "cpu") else 64  # interpreting is slow
    c = case("certain", rows, 700, 8, 4)
    monkeypatch.setattr(torch_impl, "BLOCK_BYTES", 4 * 700 * 4)  # or a block would be as large as the logits
    loss, _ = run(c, on, dtype=dtype, temperature=2.0)
    targets, labels = c.targets.to(device), c.labels.to(device)
    hidden = torch.eye(rows, device=device, dtype=dtype)
    weight = c.logits.T.to(device, dtype).contiguous()
    saved = []

    def evaluate(logits, hidden, weight):
        settings = {"temperature": 2.0, "impl": impl}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            return (
                kd_loss(logits, targets, labels, inplace=True, **settings),
                linear_kd_loss(hidden, weight, targets, labels, chunk_tokens=2, **settings),
            )

    for mode in (torch.no_grad, torch.inference_mode, None):
        given = [x.clone() for x in (c.logits.to(device, dtype), hidden, weight)]
        results = []
        if mode is None:
            peak = peak_bytes(device, lambda given=given, results=results: results.extend(evaluate(*given)))
        else:
            given = [x.requires_grad_() for x in given]

            def run_in(mode=mode, given=given, results=results):
                with mode():
                    results.extend(evaluate(*given))

            peak = peak_bytes(device, run_in)
        for out in results:
            assert not out.loss.requires_grad
            assert torch.allclose(out.loss.cpu(), loss, rtol=1e-5)
        assert torch.equal(given[0], c.logits.to(device, dtype))
        assert not saved
        assert peak < c.logits.numel() * dtype.itemsize // 2


@DEVICE_ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_targets_made_under_inference_mode(dtype: torch.dtype, on) -> None:
    """Teachers run so. Nothing that a backward keeps may be one of their tensors."""
    impl, device = on
    if impl == "triton" and dtype == torch.float64:
        impl = "reference"  # whose own type that is: it converts nothing
    c = case("plain", 3, 40, 5, 3)
    weights = torch.linspace(0.5, 2.0, 3, dtype=dtype)
    index = torch.tensor([1, 0])
    with torch.inference_mode():
        made = type(c.targets)(**{k: v.clone() if torch.is_tensor(v) else v for k, v in vars(c.targets).items()})
        made_double = type(made)(**{**vars(made), "logprobs": made.logprobs.double(), "tail": made.tail.double()})
        compact = type(made)(**{**vars(made[index]), "index": index.clone()})
        labels, w, mask = c.labels.clone().to(device), weights.clone().to(device), torch.ones(3, dtype=torch.bool)
        mask = mask.to(device)
        t = torch.tensor(2.0, device=device)
        made, made_double, compact = made.to(device), made_double.to(device), compact.to(device)
    assert made.ids.is_inference()
    ordinary = {"weights": weights.to(device), "mask": torch.ones(3, dtype=torch.bool, device=device)}
    plain = c.targets.to(device)
    plain_compact = type(plain)(**{**vars(plain[index.to(device)]), "index": index.to(device)})
    for some, expected in ((made, plain), (made_double, plain), (compact, plain_compact)):
        found = []
        for targets, labels_, t_, extra in (
            (some, labels, t, {"weights": w, "mask": mask}),
            (expected, c.labels.to(device), 2.0, ordinary),
        ):
            for inplace in (False, True):
                leaf = c.logits.detach().to(device, dtype, copy=True).requires_grad_()
                out = kd_loss(leaf * 1, targets, labels_, temperature=t_, impl=impl, inplace=inplace, **extra)
                out.loss.backward()
                found.append(leaf.grad)
            leaf = c.logits.detach()[:, :8].to(device, dtype, copy=True).requires_grad_()
            head = c.logits.detach().T.to(device, dtype, copy=True).contiguous().requires_grad_()
            out = linear_kd_loss(leaf[:, :3], head, targets, labels_, temperature=t_, impl=impl, **extra)
            out.loss.backward()
            found += [leaf.grad, head.grad]
        for a, b in zip(found[:4], found[4:], strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@DEVICE_ON
def test_hard_and_soft_carry_no_gradient_and_a_second_backward_raises(on) -> None:
    impl, device = on
    for dtype, inplace in itertools.product((torch.float32, torch.float16), (False, True)):
        c = case("plain", 4, 30, 5)
        leaf = c.logits.detach().clone().to(device, dtype).requires_grad_()
        given = leaf * 1.0
        out = kd_loss(given, c.targets.to(device), c.labels.to(device), impl=impl, inplace=inplace)
        assert not out.hard.requires_grad
        assert not out.soft.requires_grad
        assert all(x.dtype == torch.float32 for x in out)
        out.loss.backward(retain_graph=True)
        with pytest.raises(ValueError, match="second call"):
            out.loss.backward()


@DEVICE_ON
def test_in_place_spoils_nothing_silently(on) -> None:
    """An operation that had saved the logits for its own backward says that they were modified."""
    impl, device = on
    c = case("plain", 4, 30, 5)
    leaf = c.logits.detach().clone().to(device).requires_grad_()
    logits = torch.tanh(leaf)  # tanh saves its result
    out = kd_loss(logits, c.targets.to(device), c.labels.to(device), impl=impl, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_float64_logits_are_computed_in_float64() -> None:
    c = case("plain", 6, 80, 5, 4)
    leaf = c.logits.double().requires_grad_()
    kd_loss(leaf, c.targets, c.labels, temperature=2.0).loss.backward()
    _, expected = oracle(c, temperature=2.0, divergence="forward_kl", treatment="auto")
    assert (leaf.grad - expected).norm() < 1e-12


@DEVICE_ON
def test_float64_logits_are_not_for_triton(on) -> None:
    device = on[1]
    c = case("plain", 6, 80, 5, 4)
    args = c.logits.double().to(device), c.targets.to(device), c.labels.to(device)
    with pytest.raises(KDError, match=r"expected float32, bfloat16 or float16 with impl='triton'"):
        kd_loss(*args, impl="triton")
    assert torch.equal(kd_loss(*args).loss, kd_loss(*args, impl="torch").loss)


def test_auto_takes_triton_on_a_gpu_but_for_float64() -> None:
    from fastkd.kernels.loss.api import resolve_impl

    with torch._subclasses.FakeTensorMode():
        there, here = torch.empty(2, device="cuda"), torch.empty(2)
        assert resolve_impl("auto", there, torch.float32) == "triton"
        assert resolve_impl("auto", there, torch.float64) == "torch"
        assert resolve_impl("auto", here, torch.float32) == "torch"


@DEVICE_ON
def test_integer_types_and_one_count_for_all_rows(on) -> None:
    """ids, draws and labels of any integer type, and outcomes as one number."""
    c = case("plain", 5, 60, 6, 4)
    expected = run(c, on, temperature=1.5)
    for dtype in (torch.int32, torch.int64):
        changed = {"ids": c.targets.ids.to(dtype), "draws": c.targets.draws.to(dtype), "outcomes": 54}
        targets = type(c.targets)(**{**vars(c.targets), **changed})
        for found, wanted in zip(
            run(Case(c.logits, targets, c.labels.to(dtype)), on, temperature=1.5), expected, strict=True
        ):
            assert torch.equal(found, wanted)


@DEVICE_ON
def test_strided_labels_weights_mask_and_index(on) -> None:
    """Every second element of something longer, and one expanded: read where they lie."""
    impl, device = on
    c = case("plain", 6, 60, 5)
    weights, mask = torch.rand(6), torch.tensor([True, False, True, True, True, True])
    args = (c.logits.to(device), c.targets.to(device))
    labels, w, m = c.labels.to(device), weights.to(device), mask.to(device)
    expected = kd_loss(*args, labels, weights=w, mask=m, impl=impl).loss
    twice = [x.repeat_interleave(2)[::2] for x in (labels, w, m)]
    assert torch.equal(kd_loss(*args, twice[0], weights=twice[1], mask=twice[2], impl=impl).loss, expected)
    half = torch.tensor(0.5, device=device).expand(6)
    assert torch.allclose(
        kd_loss(*args, labels, weights=half, impl=impl).loss * 2, kd_loss(*args, labels, impl=impl).loss
    )
