"""torch.compile(fullgraph=True): eager's numbers, forward and backward, and no recompilation by a schedule."""

import pytest
import torch
import torch.distributed as dist
from cases import case
from test_matrix import DEVICE_ON

from fastkd import DistillationLoss, LossConfig, SparseTargets, kd_loss, linear_kd_loss

# To torch.compile an operator is opaque: interpreted kernels run in it as they do without it, which the first tests
# show. What is about graphs is shown without them.
GRAPHS_ON = pytest.mark.parametrize(
    "on",
    [
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ],
)

# torch's own compiler warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(function, *args, backend: str = "aot_eager"):
    """Run eagerly and compiled, each on fresh leaves; return the two lists of results."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args]
        out = run(*leaves)
        if out.loss.requires_grad:
            (out.loss * 3).backward()
        results.append([*(x.detach() for x in out), *(a.grad for a in leaves if torch.is_tensor(a))])
    return results


def same(pair) -> None:
    for a, b in zip(*pair, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@DEVICE_ON
@pytest.mark.parametrize(("inplace", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_logits(inplace: bool, dtype: torch.dtype, on) -> None:
    impl, device = on
    c = case("plain", 5, 48, 4, 3)
    targets, labels = c.targets.to(device), c.labels.to(device)

    def step(logits: torch.Tensor, alpha, temperature):
        return kd_loss(logits * 2.0, targets, labels, alpha=alpha, temperature=temperature, impl=impl, inplace=inplace)

    leaf = c.logits.to(device, dtype).requires_grad_()
    same(both(step, leaf, 0.3, 2.0))
    same(both(step, leaf, torch.tensor(0.3, device=device), torch.tensor(2.0, device=device)))


@DEVICE_ON
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"])
def test_divergences(divergence: str, on) -> None:
    impl, device = on
    c = case("plain", 5, 48, 4, 3)
    module = DistillationLoss(divergence=divergence, temperature=1.5, impl=impl)
    targets, labels = c.targets.to(device), c.labels.to(device)
    same(both(lambda logits: module(logits, targets, labels), c.logits.to(device).requires_grad_()))


@DEVICE_ON
@pytest.mark.parametrize("frozen", ["", "hidden", "weight", "both"])
def test_linear(frozen: str, on) -> None:
    impl, device = on
    c = case("plain", 7, 48, 4, 3)
    targets, labels = c.targets.to(device), c.labels.to(device)
    hidden = torch.randn(7, 6, device=device).requires_grad_(frozen not in ("hidden", "both"))
    weight = torch.randn(48, 6, device=device).requires_grad_(frozen not in ("weight", "both"))

    def step(hidden: torch.Tensor, weight: torch.Tensor):
        return linear_kd_loss(hidden, weight, targets, labels, softcap=5.0, impl=impl, chunk_tokens=3)

    same(both(step, hidden, weight))


@GRAPHS_ON
def test_tied_head_and_accumulator(on) -> None:
    impl, device = on
    c = case("plain", 7, 48, 4)
    targets, labels = c.targets.to(device), c.labels.to(device)
    tokens = torch.arange(7, device=device)

    def tied(weight: torch.Tensor):
        return linear_kd_loss(torch.nn.functional.embedding(tokens, weight), weight, targets, labels, impl=impl)

    same(both(tied, torch.randn(48, 6, device=device, requires_grad=True)))
    accumulators = [torch.zeros(48, 6, device=device) for _ in range(2)]

    def accumulated(hidden: torch.Tensor, weight: torch.Tensor, total: torch.Tensor):
        return linear_kd_loss(hidden, weight, targets, labels, impl=impl, grad_weight=total)

    hidden, weight = torch.randn(7, 6, device=device), torch.randn(48, 6, device=device)
    for run, total in zip(
        (accumulated, torch.compile(accumulated, fullgraph=True, backend="aot_eager")), accumulators, strict=True
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        run(h, w, total).loss.backward()
        assert w.grad is None
    assert accumulators[0].any()
    assert torch.equal(*accumulators)


@GRAPHS_ON
def test_reference_and_compact(on) -> None:
    impl, device = on
    c = case("plain", 6, 48, 4, 3)
    index = torch.tensor([5, 0, 2])
    compact = SparseTargets(**{**vars(c.targets[index]), "index": index}).to(device)
    labels = c.labels.to(device)
    for which in ("reference", impl):
        same(both(lambda z, which=which: kd_loss(z, compact, labels, impl=which), c.logits.to(device).requires_grad_()))


@GRAPHS_ON
def test_a_schedule_of_tensors_does_not_recompile(on) -> None:
    impl, device = on
    c = case("plain", 5, 48, 4)
    targets, labels = c.targets.to(device), c.labels.to(device)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=counting)
    def step(logits, alpha, temperature):
        return kd_loss(logits, targets, labels, alpha=alpha, temperature=temperature, impl=impl).loss

    losses = set()
    for i in range(4):
        alpha, t = torch.tensor(0.1 * i, device=device), torch.tensor(1.0 + i / 2, device=device)
        losses.add(float(step(c.logits.to(device), alpha, t)))
    assert len(losses) == 4
    assert len(graphs) == 1


@GRAPHS_ON
def test_a_config_compiles_and_a_schedule_in_it_does_not_recompile(on) -> None:
    """LossConfig as an argument, as the module's, and made inside; keyword arguments beside it."""
    impl, device = on
    c = case("plain", 5, 48, 4)
    targets, labels, logits = c.targets.to(device), c.labels.to(device), c.logits.to(device)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def step(logits, config, module):
        made = LossConfig(alpha=config.alpha, divergence="jsd", beta=0.3, impl=impl)
        return (
            kd_loss(logits, targets, labels, config=config, treatment="bucket").loss,
            kd_loss(logits, targets, labels, config=made).loss,
            module(logits, targets, labels).loss,
        )

    compiled, module = torch.compile(step, fullgraph=True, backend=counting), DistillationLoss(impl=impl)
    for i in range(4):
        alpha, t = torch.tensor(0.1 * i, device=device), torch.tensor(1.0 + i / 2, device=device)
        config = LossConfig(alpha=alpha, temperature=t, impl=impl)
        module.temperature = t
        assert all(map(torch.equal, compiled(logits, config, module), step(logits, config, module)))
    assert len(graphs) == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_inductor(inplace: bool) -> None:
    """The whole compiler, once: code is generated around the operators and the numbers are the same."""
    c = case("plain", 5, 48, 4, 3)

    def step(hidden: torch.Tensor, weight: torch.Tensor):
        logits = torch.nn.functional.gelu(hidden) @ weight.T
        return kd_loss(logits, c.targets, c.labels, temperature=2.0, inplace=inplace)

    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(48, 8, requires_grad=True)
    for a, b in zip(*both(step, hidden, weight, backend="inductor"), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("op", ["kd_loss", "linear_kd_loss", "attach"])
def test_operators_are_sound(op: str) -> None:
    """torch's own checks of an operator: schema, fakes, autograd registration."""
    from fastkd.kernels.loss.api import make_call

    c = case("plain", 5, 48, 4, 3)
    rows = {"labels": c.labels, "mask": None, "weights": None, "num_items": None}
    config = LossConfig(temperature=2.0, impl="torch")
    call = make_call("logits", c.logits, 48, torch.float32, c.targets, config, rows).arguments()
    hidden, weight = torch.randn(5, 8), torch.randn(48, 8)
    if op == "kd_loss":
        args = (c.logits.half().requires_grad_(), None, False, False, *call)
    elif op == "attach":
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        args = (torch.tensor(1.0), leaves, [torch.randn(5, 8), torch.randn(48, 8)], torch.tensor(2.0), None, "torch")
    else:
        args = (hidden, weight, None, None, None, 4, torch.float32, torch.float32, [True, True, False], *call)
    # not test_aot_dispatch_*: it returns the gradients that the backward scales where they lie, which no caller sees
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.fastkd, op).default, args, test_utils=utils)


@GRAPHS_ON
def test_dynamic_numbers_and_inplace(on) -> None:
    """Counts, chunks and lengths that torch.compile treats as symbols."""
    impl, device = on
    c = case("plain", 9, 48, 4, 3)
    targets, labels, weight = c.targets.to(device), c.labels.to(device), torch.randn(48, 6, device=device)

    def on_logits(logits, count):
        n = len(logits)
        return kd_loss(logits * 1, targets[:n], labels[:n], num_items=count, impl=impl, inplace=True)

    def on_hidden(hidden, chunk):
        return linear_kd_loss(hidden, weight, targets, labels, chunk_tokens=chunk, impl=impl)

    for function, x in ((on_logits, c.logits.to(device)), (on_hidden, torch.randn(9, 6, device=device))):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for number in (3, 5):
            found = []
            for run in (function, compiled):
                rows = x[:number] if function is on_logits else x
                leaf = rows.clone().requires_grad_()
                out = run(leaf, number)
                out.loss.backward()
                found.append((out.loss.detach(), leaf.grad))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@GRAPHS_ON
def test_dynamic_shapes(on) -> None:
    """One graph for batches of every length."""
    impl, device = on
    weight = torch.randn(48, 6, device=device)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def step(hidden, targets, labels):
        return linear_kd_loss(hidden, weight, targets, labels, impl=impl, temperature=2.0).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for n in (5, 7, 9):
        c = case("plain", n, 48, 4, 3)
        batch = torch.randn(n, 6, device=device), c.targets.to(device), c.labels.to(device)
        assert torch.allclose(compiled(*batch), step(*batch))
    assert len(graphs) == 1


@GRAPHS_ON
def test_a_divided_vocabulary(on) -> None:
    """The exchange between ranks is inside of the operators: a graph with a group in it is whole."""
    impl, device = on
    c = case("plain", 5, 48, 4, 3)
    targets, labels = c.targets.to(device), c.labels.to(device)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD

        def step(logits: torch.Tensor, weight: torch.Tensor):
            one = kd_loss(logits * 2.0, targets, labels, impl=impl, group=group)
            two = linear_kd_loss(logits[:, :8], weight, targets, labels, impl=impl, group=group, vocab_start=0)
            return one._replace(loss=one.loss + two.loss)

        leaves = [c.logits.to(device).requires_grad_(), torch.randn(48, 8, device=device, requires_grad=True)]
        same(both(step, *leaves))
    finally:
        dist.destroy_process_group()
