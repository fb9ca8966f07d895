"""AttentionBlock: queries, keys, values and maps against float64 and against transformers, from states and codes."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import draw, hidden, rotated64
from torch import Tensor

from fastkd.kernels import AttentionBlock, HiddenTargets, KDError, QueriesKeysValues, Segments
from fastkd.kernels.features.attention import attention_maps

ROWS, WIDTH, HEADS, KEY_HEADS, HEAD = 24, 12, 4, 2, 6


def block_of(**options: Any) -> AttentionBlock:
    q, k = HEADS * HEAD, KEY_HEADS * HEAD
    base = {"query": draw(q, WIDTH, seed=1), "key": draw(k, WIDTH, seed=2), "value": draw(k, WIDTH, seed=3)}
    return AttentionBlock(
        **{**base, "heads": HEADS, "key_heads": KEY_HEADS, "norm_weight": draw(WIDTH, seed=4), **options}
    )


INV_FREQ = 10.0 ** -torch.arange(3.0)
KINDS = {
    "plain": {},
    "bare": {"norm": "none", "norm_weight": None},
    "eps": {"eps": 10.0},
    "layer": {"norm": "layer", "norm_bias": draw(WIDTH, seed=5), "eps": 0.1},
    "biases": {
        "norm_bias": draw(WIDTH, seed=5),
        "query_bias": draw(24, seed=6),
        "key_bias": draw(12, seed=7),
        "value_bias": draw(12, seed=8),
    },
    "one bias": {"query_bias": draw(24, seed=6)},
    "rotary": {"inv_freq": INV_FREQ, "rotary_scale": 1.3},
    "partial": {"inv_freq": INV_FREQ[:2]},
    "interleaved": {"inv_freq": INV_FREQ[:2], "interleaved": True},
    "head norms": {
        "query_norm": draw(HEAD, seed=9),
        "key_norm": draw(HEAD, seed=10),
        "inv_freq": INV_FREQ,
        "head_eps": 0.1,
    },
    "norms of all heads": {"query_norm": draw(24, seed=9), "key_norm": draw(12, seed=10)},
    "logits": {"scale": 0.3, "softcap": 4.0},
}


def reference(b: AttentionBlock, x_ND: Tensor, positions: Tensor) -> list[Tensor]:
    """Queries, keys and values, one state and one head after another."""
    results: list[list[Tensor]] = [[], [], []]
    for x, position in zip(x_ND, positions, strict=True):
        y = x
        if b.norm == "rms":
            y = x / (x.square().mean() + b.eps).sqrt()
        elif b.norm == "layer":
            y = (x - x.mean()) / ((x - x.mean()).square().mean() + b.eps).sqrt()
        y = y if b.norm_weight is None else y * b.norm_weight
        y = y if b.norm_bias is None else y + b.norm_bias
        for out, name in zip(results, ("query", "key", "value"), strict=True):
            v, bias = getattr(b, name) @ y, getattr(b, f"{name}_bias")
            v = v if bias is None else v + bias
            weight = getattr(b, f"{name}_norm", None)
            if weight is not None and len(weight) == len(v):
                v = v / (v.square().mean() + b.head_eps).sqrt() * weight
            heads = []
            for h in v.split(HEAD):
                if weight is not None and len(weight) == HEAD:
                    h = h / (h.square().mean() + b.head_eps).sqrt() * weight
                if b.inv_freq is not None and name != "value":
                    h = h.clone()
                    for i, frequency in enumerate(b.inv_freq.tolist()):
                        one, other = (2 * i, 2 * i + 1) if b.interleaved else (i, i + len(b.inv_freq))
                        angle = torch.tensor(float(position) * frequency, dtype=torch.float64)
                        turned = (
                            torch.complex(h[one], h[other]) * torch.polar(angle.new_ones(()), angle) * b.rotary_scale
                        )
                        h[one], h[other] = turned.real, turned.imag
                heads.append(h)
            out.append(torch.stack(heads))
    return [torch.stack(x) for x in results]


@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: str) -> None:
    """From states, and from codes, whose states are rotated back for the reference."""
    block, positions = block_of(**KINDS[kind]), torch.arange(ROWS) * 3
    x = hidden(rows=ROWS)
    targets = rotated64(HiddenTargets.from_states(x, step=0.1))
    targets = replace(targets, scale=targets.scale.double() * 0.1)  # so that eps counts
    assert len(targets.exact_rows) == 2
    for states, of in ((x, x), (targets, targets.states(dtype=torch.float64))):
        ours = block.queries_keys_values(states, positions, dtype=torch.float64)
        for got, expected in zip(ours[:3], reference(block, of, positions), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert ours[3:] == (block.scale, block.softcap)
        single = block.queries_keys_values(states, positions)
        for got, expected in zip(single[:3], ours[:3], strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=1e-4)
    plain = block.queries_keys_values(targets, rotary=False, values=False, dtype=torch.float64)
    assert plain.values is None
    unrotated = replace(block, inv_freq=None).queries_keys_values(targets, dtype=torch.float64)
    assert torch.equal(plain.queries, unrotated.queries)
    assert torch.equal(plain.keys, unrotated.keys)


def test_a_state_of_zeros_has_finite_queries() -> None:
    x = hidden(rows=ROWS)
    x[4] = 0
    for kind in KINDS:
        block = block_of(**KINDS[kind])
        ours = block.queries_keys_values(HiddenTargets.from_states(x, step=0.1), torch.arange(ROWS))
        assert all(bool(v.isfinite().all()) for v in ours[:3])


def test_autocast_changes_nothing() -> None:
    x = hidden(rows=ROWS)
    for states in (HiddenTargets.from_states(x, step=0.1), x.float()):
        block = block_of()
        with torch.autocast("cpu", torch.bfloat16):
            cast = block.queries_keys_values(states)
        for one, other in zip(cast[:3], block.queries_keys_values(states)[:3], strict=True):
            assert torch.equal(one, other)


def test_a_basis_is_folded_once() -> None:
    block, x = block_of(), hidden(rows=ROWS)
    targets = HiddenTargets.from_states(x)
    block.queries_keys_values(targets[:5])
    (folded,) = block._folded.values()
    block.queries_keys_values(targets[5:])
    assert [*block._folded.values()] == [folded]
    copy = pickle.loads(pickle.dumps(block))
    assert torch.equal(copy.queries_keys_values(targets).keys, block.queries_keys_values(targets).keys)
    del targets
    assert not block._folded


def test_parts_and_back() -> None:
    for options in KINDS.values():
        block = block_of(**options)
        tensors, settings = block.parts()
        again = AttentionBlock.from_parts(tensors, settings)
        assert again.parts()[1] == settings
        assert all(torch.equal(x, tensors[name]) for name, x in again.parts()[0].items())
        assert len(again.tensors()) == len(tensors)
    with pytest.raises(KDError, match="got an unknown 'wings'; expected some of "):
        AttentionBlock.from_parts(tensors, {**settings, "wings": 2})
    with pytest.raises(KDError, match="got no 'heads'"):
        AttentionBlock.from_parts(tensors, {})


def test_a_block_moves_and_changes_its_type() -> None:
    block = block_of(**KINDS["biases"])
    assert {x.device.type for x in block.to("meta").tensors()} == {"meta"}
    half = block.map(lambda x: x.bfloat16())
    assert half.queries_keys_values(hidden(rows=ROWS)).queries.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 5}, "heads: got 5 query and 2 key heads for projections of 24, 12 and 12 rows"),
        ({"key_heads": 3}, "heads: got 4 query and 3 key heads"),
        ({"key_heads": 1}, "heads: got 4 query and 1 key heads"),
        ({"heads": 0}, "heads: got 0; expected a positive integer"),
        ({"key": None}, "attention block.key: got None; expected a tensor"),
        ({"key": torch.zeros(12, 5)}, r"attention block.key: got shape \(12, 5\); expected \(12, 12\), to fit query"),
        ({"value": torch.zeros(12)}, r"attention block.value: got shape \(12,\)"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight: got shape"),
        ({"query_norm": torch.zeros(3)}, r"query_norm: got shape \(3,\); expected \(6,\)"),
        ({"inv_freq": torch.zeros(4)}, "inv_freq: got 4 angles for heads of 6"),
        ({"norm": "batch"}, "norm: got 'batch'; expected one of rms, layer, none"),
        ({"norm": "none"}, "norm: got 'none' with a weight"),
        ({"eps": "a"}, "eps: got 'a'; expected a number"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(KDError, match=says):
        block_of(**change)


def test_states_that_do_not_fit_are_named() -> None:
    block, x = block_of(inv_freq=INV_FREQ), hidden(rows=ROWS)
    for states, positions, says in (
        (x[:, :5], torch.arange(ROWS), "states: got 5 components; expected 12, as the layer takes"),
        (x[0], torch.arange(ROWS), r"states: got \(12,\)"),
        (x, None, "position_ids: got None; expected a position for each of 24 states"),
        (x, torch.arange(3), r"position_ids: got \(3,\)"),
        (x, torch.arange(24.0), "position_ids: got torch.float32; expected whole numbers"),
    ):
        with pytest.raises(KDError, match=says):
            block.queries_keys_values(states, positions)


LENGTH = 40
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        }
    },
    "Qwen3": {"head_dim": 20},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    "GPTNeoX": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "Cohere": {},
    "Olmo2": {},
}


@pytest.fixture(scope="module", params=MODELS)
def probe(request: pytest.FixtureRequest) -> tuple[AttentionBlock, Tensor, Tensor]:
    """A tiny random model's second layer: its block, the states that enter it, and its eager attention maps."""
    transformers = pytest.importorskip("transformers")
    name = request.param
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 if name == "GPTNeoX" else 2, max_position_embeddings=64, attn_implementation="eager",
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **MODELS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights large enough for maps that are not flat, norms that are not 1
            parameter.normal_(0 if parameter.ndim > 1 or name == "Gemma2" else 1, 0.2)
    layer = model.layers[1]
    attention = layer.attention if name == "GPTNeoX" else layer.self_attn
    seen: dict[str, Tensor] = {}

    def keep_states(module: Any, args: Any, kwargs: Any) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    layer.register_forward_pre_hook(keep_states, with_kwargs=True)
    attention.register_forward_hook(lambda m, args, out: seen.update(maps=out[1]))
    with torch.no_grad():
        model(torch.randint(3, 64, (1, LENGTH)))
    return block_from(name, config, model, layer, attention), seen["x"][0], seen["maps"][0]


def block_from(name: str, config: Any, model: Any, layer: Any, attention: Any) -> AttentionBlock:
    rotary = model.rotary_emb
    options: dict[str, Any] = {"inv_freq": rotary.inv_freq, "rotary_scale": rotary.attention_scaling, "heads": 4}
    if name == "GPTNeoX":
        parts = [
            x.reshape(4, 3, 16, *x.shape[1:])
            for x in (attention.query_key_value.weight, attention.query_key_value.bias)
        ]
        for i, which in enumerate(("query", "key", "value")):
            options |= {which: parts[0][:, i].flatten(0, 1), f"{which}_bias": parts[1][:, i].flatten()}
        options |= {"key_heads": 4, "norm": "layer", "eps": config.layer_norm_eps}
    else:
        for which in "query", "key", "value":
            options[which] = getattr(attention, f"{which[0]}_proj").weight
        options |= {"key_heads": 2, "eps": config.layer_norm_eps if name == "Cohere" else config.rms_norm_eps}
    if name == "Olmo2":
        options |= {"norm": "none"}
    else:
        norm = layer.input_layernorm
        options |= {"norm_weight": norm.weight + (name == "Gemma2"), "norm_bias": getattr(norm, "bias", None)}
    if name in ("Qwen3", "Olmo2"):
        options |= {
            "query_norm": attention.q_norm.weight,
            "key_norm": attention.k_norm.weight,
            "head_eps": config.rms_norm_eps,
        }
    if name == "Cohere":
        options |= {"norm": "layer", "interleaved": True}
    if name == "Gemma2":
        options |= {"scale": attention.scaling, "softcap": attention.attn_logit_softcapping}
    return AttentionBlock(**{n: x.detach() if isinstance(x, Tensor) else x for n, x in options.items()})


def kl(p: Tensor, q: Tensor) -> float:
    return float(torch.where(p > 0, p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log(), 0.0).sum(-1).mean())


def test_maps_are_those_of_eager_attention(probe: tuple[AttentionBlock, Tensor, Tensor]) -> None:
    block, x, expected = probe
    ours = attention_maps(block.queries_keys_values(x, torch.arange(LENGTH)), slice(None))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    uniform = torch.ones(LENGTH, LENGTH).tril() / torch.arange(1, LENGTH + 1)[:, None]
    assert kl(expected, uniform.expand_as(expected)) > 0.05  # the maps are not flat
    shifted = attention_maps(block.queries_keys_values(x.roll(1, 0), torch.arange(LENGTH)), slice(None))
    assert kl(expected, shifted) > 0.02


def test_maps_from_codes_are_close(probe: tuple[AttentionBlock, Tensor, Tensor]) -> None:
    block, x, expected = probe
    losses = []
    for step in (0.2, 0.05, 1e-3):
        targets = HiddenTargets.from_states(x, step=step)
        ours = attention_maps(block.queries_keys_values(targets, torch.arange(LENGTH)), slice(None))
        losses.append(kl(expected, ours))
    assert losses[0] < 0.05
    assert losses[0] > 4 * losses[1] > 0
    assert losses[2] < 1e-5


def test_two_sequences_in_one_call(probe: tuple[AttentionBlock, Tensor, Tensor]) -> None:
    block, x, expected = probe
    both = block.queries_keys_values(torch.cat([x[:9], x]), torch.cat([torch.arange(9), torch.arange(LENGTH)]))
    assert isinstance(both, QueriesKeysValues)
    ours = attention_maps(both, slice(9, None), Segments((0, 9, 9 + LENGTH)))
    torch.testing.assert_close(ours[:, :, 9:], expected, atol=1e-5, rtol=0)
    assert not ours[:, :, :9].any()
