"""What a choice is made of, against obvious lines: scores, the order of layers, KL, shapes and sizes."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from train_cases import documents

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.errors import StreamError
from fastkd.evaluate.api import evaluate
from fastkd.models.axes import Shape, read_axes
from fastkd.models.module import parameters_and_bytes
from fastkd.models.prune import Kept, prune
from fastkd.models.quantization import SCHEMES, quantised_weights, quantize
from fastkd.models.taps import layers_of
from fastkd.students.budget import Sizes, read_budget
from fastkd.students.choose import logits_of
from fastkd.students.depth import Skipping, removal_order
from fastkd.students.importance import Tally, best
from fastkd.students.sample import kl_on, read_sample
from fastkd.students.shapes import candidates, grid_of, multiples, scaled
from fastkd.train.student import of_transformers

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    place = tmp_path_factory.mktemp("measuring") / "cache"
    fastkd.capture(model_of("llama"), documents(40), place, k=20, draws=3, context=16, held_out=0.2)
    return open_cache(place)


def scores_in_obvious_lines(model: Any, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """groups, mlp and hidden, of documents one by one, in float64."""
    model = model.double()
    entered: dict[str, list[Tensor]] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def record(module: Any, given: Any) -> None:
        entered.setdefault(names[id(module)], []).append(given[0][0])

    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_pre_hook(record) for m in linear]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    x = {name: torch.cat(found) for name, found in entered.items()}
    layers = range(len(layers_of(model)))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    groups, mlp, hidden = [], [], []
    for n in layers:
        at = f"model.layers.{n}"
        o, down = weights[f"{at}.self_attn.o_proj.weight"], weights[f"{at}.mlp.down_proj.weight"]
        columns = o.shape[1] // 2  # of each of two key-value heads
        parts = [x[f"{at}.self_attn.o_proj"][:, c : c + columns] @ o[:, c : c + columns].T for c in (0, columns)]
        groups.append(torch.stack([part.square().sum() for part in parts]))
        mlp.append(torch.stack([torch.outer(a, w).square().sum() for a, w in zip(x[f"{at}.mlp.down_proj"].T, down.T)]))  # noqa: B905
        for readers in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            stacked = torch.cat([weights[f"{at}.{reader}.weight"] for reader in readers])
            states = x[f"{at}.{readers[0]}"]
            squares = torch.stack(
                [torch.outer(states[:, i], stacked[:, i]).square().sum() for i in range(len(stacked.T))]
            )
            hidden.append(squares / squares.sum())
    squares = x["lm_head"].square().sum(0) * weights["lm_head.weight"].square().sum(0)
    hidden.append(squares / squares.sum())
    return torch.stack(groups), torch.stack(mlp), torch.stack(hidden).mean(0)


def test_scores(cache: Cache) -> None:
    """Of padded rows, without the pads."""
    model = model_of("llama")
    sample = read_sample(cache, 150, seed=0, device=CPU)
    assert any(not bool(batch.padding_mask().all()) for batch in sample.batches)
    student = of_transformers(model, "t")
    with Tally(model, read_axes(model)) as tally:
        kl_on(sample, tally.of(logits_of(student)))
    found = tally.importance()
    rows = [ids[mask] for b in sample.batches for ids, mask in zip(b.input_ids, b.padding_mask(), strict=True)]
    groups, mlp, hidden = scores_in_obvious_lines(model, rows)
    torch.testing.assert_close(found.groups, groups, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mlp, mlp, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-4, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gpt2_has_scores_too(cache: Cache) -> None:
    """A head whose output is 0, and a unit, have the score 0."""
    model = model_of("gpt2", bos_token_id=0, eos_token_id=1)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[8:16] = 0  # the inputs of head 1
        model.transformer.h[0].mlp.c_proj.weight[5] = 0
    sample = read_sample(cache, 60, seed=0, device=CPU)
    with Tally(model, read_axes(model)) as tally:
        kl_on(sample, tally.of(logits_of(of_transformers(model, "t"))))
    found = tally.importance()
    assert (found.groups == 0).nonzero().tolist() == [[1, 1]]
    assert (found.mlp == 0).nonzero().tolist() == [[0, 5]]
    assert found.hidden.sum() == pytest.approx(1)


def test_best() -> None:
    assert best(torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0]), 2).tolist() == [1, 2]
    assert best(torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [0, 1]


def test_kl_is_that_of_an_evaluation(cache: Cache) -> None:
    student = of_transformers(model_of("llama", seed=1), "s")
    sample = read_sample(cache, 10**9, seed=0, device=CPU)
    expected = evaluate(student, cache, split="train")
    assert sample.counted == expected.count
    assert kl_on(sample, logits_of(student)) == pytest.approx(expected.intervals()["kl_bucket"].mean, rel=1e-5)
    assert kl_on(sample, logits_of(of_transformers(model_of("llama"), "t"))) < 1e-3
    small = read_sample(cache, 40, seed=0, device=CPU)
    assert 40 <= small.positions < sample.positions
    assert small.first(1).batches == small.batches[:1]
    draws_only = replace(cache.spec, k=0)
    with pytest.raises(StreamError, match="without top-k entries"):
        read_sample(_With(draws_only), 40, seed=0, device=CPU)  # type: ignore[arg-type]


class _With:
    def __init__(self, spec: Any) -> None:
        self.spec = spec


def test_a_model_without_some_layers(cache: Cache) -> None:
    """As a copy without them; with the states of the whole model reused."""
    model = model_of("llama", num_hidden_layers=4, initializer_range=0.3)
    axes, sample = read_axes(model), read_sample(cache, 60, seed=0, device=CPU)
    without = Skipping(model, sample, logits_of(of_transformers(model, "t")), lambda done: None)
    whole = kl_on(sample, logits_of(of_transformers(model, "t")))
    for gone in ({0}, {3}, {1, 2}, {0, 3}, {0, 1, 2, 3}):
        layers = tuple(n for n in range(4) if n not in gone)
        found = without(frozenset(gone))
        assert found != pytest.approx(whole, rel=1e-3)
        if layers:
            pruned = prune(model, axes, replace(Kept.all_of(axes), layers=layers))
            assert found == pytest.approx(kl_on(sample, logits_of(of_transformers(pruned, "p"))), rel=1e-5)
    assert kl_on(sample, logits_of(of_transformers(model, "t"))) == whole


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=9), st.integers(0, 2**16), st.data())
def test_the_order_is_that_of_a_greedy_search(costs: list[float], seed: int, data: Any) -> None:
    """Where a layer costs no less after others: the same as trying all of them each time, with fewer trials."""
    count = data.draw(st.integers(1, len(costs)))
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.rand(len(costs), len(costs), generator=generator).tolist()
    tried: list[frozenset[int]] = []

    def kl(gone: frozenset[int]) -> float:
        tried.append(gone)
        return sum(costs[n] for n in gone) + sum(pairs[a][b] for a, b in product(gone, gone) if a < b)

    order, after = removal_order(len(costs), count, kl)
    assert len(set(tried)) == len(tried)
    expected: list[int] = []
    for _ in range(count):
        rest = [n for n in range(len(costs)) if n not in expected]
        # what each adds: its own cost, and more with those that are gone
        expected.append(min(rest, key=lambda n: kl(frozenset([*expected, n]))))
    assert order == expected
    assert after == [kl(frozenset(order[: n + 1])) for n in range(count)]


# Shapes and sizes


def test_multiples() -> None:
    assert multiples(1536)[:2] == [32, 64]
    assert multiples(1536)[-1] == 1536
    assert multiples(576, 9) == [144, 288, 432, 576]
    assert multiples(64) == [16, 32, 48, 64]
    assert multiples(100) == [16, 32, 48, 64, 80, 96, 100]
    assert multiples(576, 9, 32) == [288, 576]
    assert multiples(5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_candidates_fit(name: str) -> None:
    changes = {"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}
    axes = read_axes(model_of(name, **changes))
    grid = grid_of(axes)
    smallest, whole = axes.parameters(grid.smallest), axes.parameters(axes.shape)
    for limit in torch.linspace(smallest, whole - 1, 12).long().tolist():

        def fits(shape: Shape, limit: int = limit) -> bool:
            return axes.parameters(shape) <= limit

        found = candidates(axes, grid, fits)
        assert found
        assert len(found) == len(set(found)) <= 12
        for shape in [*found, scaled(axes, grid, fits)]:
            assert shape is not None
            assert fits(shape)
            assert axes.allows(shape)
            for axis in ("layers", "hidden", "groups", "mlp"):
                assert getattr(shape, axis) in getattr(grid, axis)
            if shape.layers == 6:  # no width could be a step larger, alone
                wider = [n for n in grid.mlp if n > shape.mlp][:1]
                assert not any(fits(replace(shape, mlp=n)) for n in wider)
        assert len({shape.layers for shape in found}) > 1 or limit in (smallest, whole - 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_on_disk(name: str, dtype: str, tmp_path: Path) -> None:
    for tied in (False, True):
        model = model_of(name, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1)
        axes = read_axes(model)
        found = Sizes(model, axes, read_budget("1GB", dtype=dtype)).of(axes.shape)
        model.to(getattr(torch, dtype)).save_pretrained(tmp_path / str(tied))
        size = (tmp_path / str(tied) / "model.safetensors").stat().st_size
        assert size <= found < size + 100 * len(axes.tensors) * axes.shape.layers


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_bytes_of_a_scheme(scheme: str) -> None:
    """Codes, packed, and scales of each weight; all else as it is."""
    model = model_of("llama", hidden_size=64, intermediate_size=96)
    axes, how = read_axes(model), quantised_weights(model, SCHEMES[scheme])
    expected = 0
    for name, weight in model.named_parameters():
        if name in how:
            codes, scales = quantize(weight, how[name])
            expected += codes.numel() * how[name].bits // 8 + scales.numel() * 4
        else:
            expected += weight.numel() * 4
    found = Sizes(model, axes, read_budget("1GB", quantize=scheme)).of(axes.shape)
    headers = 300 * len(list(model.parameters()))
    assert expected <= found <= expected + headers
    assert found < parameters_and_bytes(model)[1]


def test_budgets() -> None:
    for text, limit, in_bytes in (
        ("80M", 80_000_000, False), ("1.5G", 1_500_000_000, False), ("60MB", 60_000_000, True), ("7kB", 7000, True),
        ("123456", 123_456, False), ("0.5GB", 500_000_000, True), ("12B", 12, True),
    ):  # fmt: skip
        found = read_budget(text)
        assert (found.limit, found.in_bytes) == (limit, in_bytes)
    assert read_budget("60MB").show(12_345_678) == "12.3 MB"
    assert read_budget("60M").show(12_345_678) == "12,345,678 parameters"
