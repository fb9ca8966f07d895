"""The attention of one layer of a transformers model: its projections, norms and rotary embedding, found and proven.

attention = read_attention(teacher, 20)
block = attention.block()  # recomputes queries, keys and values from the state that enters the layer

attention = read_attention(student, 16)
with Taps(student, attention.outputs) as taps:
    student(tokens)
attention.of_outputs(taps.values, position_ids)  # with gradients

What a layer computes is read from its modules and config, in all the ways in which models differ; the first reading
that gives the layer's own attention maps on a probe counts.
"""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import TeacherError
from ..kernels import AttentionBlock, KDError, QueriesKeysValues
from ..utils.distributed import is_dtensor
from .hub import brief
from .taps import layers_of

PROJECTIONS = ("query", "key", "value")
_PROBE = (2, 23)  # rows and tokens; no number of heads
_CLOSE = 1e-5  # by which two attention maps may differ; more where the model's own type is coarser
_CLOSE_LOGS = 0.1  # there, by which their logarithms may differ, as a share of how much these vary
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_LATENT = ("kv_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor")
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
_SLIDING = ("sliding_attention", "chunked_attention")


class Norm(NamedTuple):
    """kind: "rms" (x / rms(x) · weight) or "layer" (with its mean removed). weight, bias `[D]`, or None."""

    kind: Literal["rms", "layer"]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        if self.kind == "layer":
            return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        x = nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return x if self.bias is None else x + self.bias


class Projection(NamedTuple):
    """The rows of a linear module that make the queries, the keys or the values: all if None. path: its name."""

    module: nn.Module
    path: str
    rows: Tensor | None

    def of(self, output: Tensor) -> Tensor:
        """These numbers of the module's output `[..., O]`."""
        return output if self.rows is None else output[..., self.rows.to(output.device)]

    def weight(self) -> Tensor:
        """`[H · d, D]`, float32."""
        weight = _plain(self.module.weight)
        if not isinstance(self.module, nn.Linear):
            weight = weight.T  # transformers' Conv1D
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    def bias(self) -> Tensor | None:
        bias: Any = getattr(self.module, "bias", None)
        return None if bias is None else self.of(_plain(bias))


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary embedding: of each head's first 2 · r components, i and i + r (interleaved: 2i and 2i + 1) are turned by
    position · inv_freq[i]. inv_freq `[r]`, float32. scaling: a factor of cosines and sines."""

    inv_freq: Tensor
    scaling: float
    interleaved: bool

    def __call__(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Turn `[N, H, d]`. position_ids: `[N]`."""
        angles = (position_ids[:, None].float() * self.inv_freq.to(x.device))[:, None]
        cos, sin = ((t * self.scaling).to(x.dtype) for t in (angles.cos(), angles.sin()))
        r = len(self.inv_freq)
        turned, rest = x[..., : 2 * r], x[..., 2 * r :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], -1)
        a, b = turned[..., :r], turned[..., r:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """How a layer computes its attention; made by `read_attention`.

    layer: its number. outputs: the names of the modules whose outputs are the queries, the keys and the values (two or
    three of them may be one). by_head: whether these are `[B, H, L, d]`.
    norm: between the state that enters the layer and the projections; None: there is none. projections: of queries,
    keys and values. heads, key_heads, width: H, G and d. query_norm, key_norm: behind the projections, over d or H · d
    components. scale, softcap: of the logits.
    """

    layer: int
    outputs: tuple[str, str, str]
    by_head: tuple[bool, bool, bool]
    norm: Norm | None
    projections: tuple[Projection, Projection, Projection]
    heads: int
    key_heads: int
    width: int
    query_norm: Norm | None
    key_norm: Norm | None
    rotary: Rotary | None
    scale: float
    softcap: float | None

    def block(self) -> AttentionBlock:
        """What makes queries, keys and values of the state that enters the layer: its own weights, as they are now."""
        norm, behind, rotary = self.norm, (self.query_norm, self.key_norm), self.rotary
        weights = {name: p.weight() for name, p in zip(PROJECTIONS, self.projections, strict=True)}
        biases: dict[str, Any] = {f"{n}_bias": p.bias() for n, p in zip(PROJECTIONS, self.projections, strict=True)}
        return AttentionBlock(
            **weights,
            **biases,
            heads=self.heads,
            key_heads=self.key_heads,
            norm="none" if norm is None else norm.kind,
            norm_weight=norm and norm.weight,
            norm_bias=norm and norm.bias,
            eps=0.0 if norm is None else norm.eps,
            query_norm=behind[0] and behind[0].weight,
            key_norm=behind[1] and behind[1].weight,
            head_eps=0.0 if behind[0] is None else behind[0].eps,
            inv_freq=None if rotary is None else rotary.inv_freq.to(weights["query"].device),
            rotary_scale=1.0 if rotary is None else rotary.scaling,
            interleaved=rotary is not None and rotary.interleaved,
            scale=self.scale,
            softcap=self.softcap,
        )

    def of_outputs(self, outputs: Mapping[str, Tensor], position_ids: Tensor) -> QueriesKeysValues:
        """From what the modules in `outputs` returned for `[B, L]` positions; N = B · L. position_ids `[B, L]`."""
        behind = (self.query_norm, self.key_norm, None)
        made = []
        for i, projection in enumerate(self.projections):
            x = outputs[self.outputs[i]]
            x = x.transpose(1, 2) if self.by_head[i] else x
            x = x.reshape(position_ids.numel(), -1)
            x = x if behind[i] is not None else projection.of(x)
            made.append(x.reshape(len(x), -1, self.width))
        q, k, v = made
        if self.rotary is not None:
            q, k = (self.rotary(x, position_ids.reshape(-1)) for x in (q, k))
        return QueriesKeysValues(q, k, v, self.scale, self.softcap)


def to_bytes(block: AttentionBlock) -> bytes:
    """A block as a safetensors file; its settings are in the metadata."""
    tensors, settings = block.parts()
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={"settings": json.dumps(settings)})


def from_bytes(data: bytes) -> AttentionBlock:
    """The block in a safetensors file. ValueError if there is none."""
    try:
        length = int.from_bytes(data[:8], "little")
        settings = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["settings"])
        block = AttentionBlock.from_parts(safetensors.torch.load(data), settings)
    except (safetensors.SafetensorError, KDError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"got no attention block ({brief(error)})") from error
    if broken := [name for name, tensor in block.parts()[0].items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"got an attention block with NaN or infinity in {broken[0]}")
    return block


def read_attention(
    model: Any, layer: int, *, context: int | None = None, error: type[Exception] = TeacherError
) -> LayerAttention:
    """The attention of a layer, by its number from 0, of a causal model of transformers in evaluation mode.

    context: positions in the longest segment; None: any number.
    Raises `error` if it has no attention of that kind (as of a state space model), if its maps are not those of queries
    and keys alone (multi-head latent attention), if it does not see all of the context, or if no reading of it gives
    its maps.
    """
    where = f"layer {layer} of {type(model).__name__}"
    if not hasattr(model, "set_attn_implementation"):
        raise error(f"{where}: got no model of transformers; expected one, to read its attention from.")
    module = layers_of(model)[layer]
    names = dict(module.named_modules())
    if latent := [name for name in names if name.rpartition(".")[2] in _LATENT]:
        raise error(f"{where}: got multi-head latent attention ({latent[0]}), whose maps are not recomputed here.")
    _check_window(model, module, layer, context, where, error)
    probe = _Probe(model, module, context, where, error)
    worst = None
    for reading in _readings(model, module, layer, probe, where, error):
        difference = probe.difference(reading)
        if difference <= probe.bound:
            return reading
        worst = difference if worst is None else min(worst, difference)
    raise error(
        f"{where}: its attention is not reproduced from the state that enters it: on {_PROBE[1]} tokens its maps "
        f"differ by {worst if worst is not None else float('nan'):.2g}; expected at most {probe.bound:.1g}."
    )


class _Probe:
    """What a layer did with some tokens, in eager attention: its maps, and the tensors between the modules.

    One row of tokens is at the first positions, the other at the last ones of the context: some models scale queries
    by their position (Llama 4, Ministral 3), which shows only there.
    """

    def __init__(self, model: Any, module: nn.Module, context: int | None, where: str, error: type[Exception]) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(0, ids, _PROBE, generator=generator).to(model.device)
        self.positions = torch.arange(_PROBE[1], device=model.device).repeat(_PROBE[0], 1)
        options: dict[str, Any] = {"use_cache": False, "output_attentions": True}
        if "position_ids" in inspect.signature(model.base_model.forward).parameters:
            length = context or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
            self.positions[-1] += max(int(length) - _PROBE[1], 0)
            options["position_ids"] = self.positions
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        maps: list[Tensor] = []
        handles = [inner.register_forward_hook(self._note(name, maps)) for name, inner in module.named_modules()]
        handles.append(module.register_forward_pre_hook(self._note_input, with_kwargs=True))
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")
            with torch.no_grad():
                model.base_model(input_ids=tokens, **options)
        except Exception as problem:
            raise error(f"{where}: it cannot be run with eager attention ({brief(problem)}).") from problem
        finally:
            for handle in handles:
                handle.remove()
            model.set_attn_implementation(before)
        if not maps or "" not in self.inputs:
            raise error(f"{where}: it has no attention maps to recompute.")
        self.state, self.maps = self.inputs[""], maps[0].float()
        self.eps = float(torch.finfo(maps[0].dtype).eps) if maps[0].dtype.itemsize < 4 else 0.0
        self.bound = max(_CLOSE, 4 * self.eps)

    def difference(self, reading: LayerAttention) -> float:
        """The largest difference of the maps that a reading gives from the layer's own, and of its log-maps where that
        is larger in proportion: in maps that are nearly uniform, a wrong scale hardly shows."""
        worst = 0.0
        length = self.state.shape[1]
        try:
            block = reading.block()
        except KDError:  # its parts do not fit together
            return float("inf")
        for state, own, position_ids in zip(self.state.float(), self.maps, self.positions, strict=True):
            q, k, _, scale, softcap = block.queries_keys_values(state, position_ids)
            k = k.repeat_interleave(reading.heads // reading.key_heads, 1)
            logits = torch.einsum("qhd,khd->hqk", q, k) * (reading.width**-0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            hidden = torch.ones(length, length, dtype=torch.bool, device=logits.device).triu(1)
            ours = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            if ours.shape != own.shape:
                return float("inf")
            worst = max(worst, float((ours - own).abs().max()))
            if self.bound == _CLOSE:  # logits of neighbours
                a, b = ((x[:, 2:, 1] / x[:, 2:, 0]).log() for x in (ours, own))
                usual = float(b.abs().max())
                worst = max(worst, _CLOSE * float((a - b).abs().max()) / max(1e-3 * usual, 1e-6))
            else:  # the bound alone is wider than the differences of maps that are nearly uniform
                share = _difference_of_logs(ours, own, 16 * self.eps)
                worst = max(worst, self.bound * share / _CLOSE_LOGS)
        return worst

    def _note(self, name: str, maps: list[Tensor]) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            if arguments and isinstance(arguments[0], Tensor) and name:
                self.inputs[name] = arguments[0]
            value = result[0] if isinstance(result, tuple) and result else result
            if isinstance(value, Tensor):
                self.outputs[name] = value
            found = [x for x in result if isinstance(x, Tensor) and x.ndim == 4] if isinstance(result, tuple) else []
            maps.extend(x for x in found if x.shape[-1] == x.shape[-2] == _PROBE[1])

        return hook

    def _note_input(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        value = next((x for x in (*arguments, *keywords.values()) if isinstance(x, Tensor)), None)
        if value is not None:
            self.inputs[""] = value


def _difference_of_logs(ours: Tensor, own: Tensor, least: float) -> float:
    """The root mean square difference of the logarithms of two maps `[H, Q, K]`, relative to that of the second's from
    the mean of each row, which counts as at least `least`. Of numbers that matter: those above 1e-3."""
    some = own > 1e-3
    logs = own.clamp_min(1e-30).log()
    means = (logs * some).sum(-1, keepdim=True) / some.sum(-1, keepdim=True).clamp_min(1)
    varies = float((logs - means)[some].square().mean().sqrt())
    differs = float((ours.clamp_min(1e-30).log() - logs)[some].square().mean().sqrt())
    return differs / max(varies, least)


def _readings(
    model: Any, module: nn.Module, layer: int, probe: _Probe, where: str, error: type[Exception]
) -> Iterator[LayerAttention]:
    """What the modules and the config of a layer may mean, the likeliest first."""
    config = model.config.get_text_config()
    names = dict(module.named_modules())
    own = next(f"{name}." for name, inner in model.named_modules() if inner is module)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    key_heads = next((int(n) for name in _KEY_HEADS if (n := getattr(config, name, None))), heads)
    found = list(_projections(module, names, heads, key_heads))
    if not found or not heads:
        raise error(f"{where}: it has no query, key and value projections of a kind known here; no maps to recompute.")
    for projections, of_heads in found:
        queries = projections[0]
        inner = names[queries.path]
        folder = queries.path.rpartition(".")[0]
        attention = names.get(folder, module)
        width = (inner.weight.numel() // probe.state.shape[-1] if queries.rows is None else len(queries.rows)) // heads
        norms = list(_norms(names, probe, probe.state, probe.inputs.get(queries.path)))
        behind = _norms_behind(attention, folder, probe)
        paths = [p.path if at is None else at[1] for p, at in zip(projections, (*behind, None), strict=True)]
        by_head = [
            probe.outputs[path].shape[1:3] == (h, _PROBE[1]) for path, h in zip(paths, (heads, of_heads), strict=False)
        ]
        scales = [float(s) for name in _SCALES if isinstance(s := getattr(attention, name, None), (int, float))]
        multiplier = getattr(config, "attention_multiplier", None)
        scales += [float(multiplier)] if isinstance(multiplier, (int, float)) else []
        softcaps = [getattr(config, "attn_logit_softcapping", None), None]
        for norm, rotary, scale, softcap in product(
            norms, _rotaries(model, width), dict.fromkeys([*scales, width**-0.5, 1.0]), dict.fromkeys(softcaps)
        ):
            yield LayerAttention(
                layer=layer, outputs=(own + paths[0], own + paths[1], own + paths[2]),
                by_head=(by_head[0], by_head[1], False), norm=norm, projections=projections, heads=heads,
                key_heads=of_heads, width=width,
                query_norm=behind[0] and behind[0][0], key_norm=behind[1] and behind[1][0], rotary=rotary, scale=scale,
                softcap=softcap,
            )  # fmt: skip


def _projections(
    module: nn.Module, names: dict[str, nn.Module], heads: int, key_heads: int
) -> Iterator[tuple[tuple[Projection, Projection, Projection], int]]:
    """The query, key and value projections of a layer, in all ways to divide a fused one, and the key heads."""
    for path in names:
        folder, _, last = path.rpartition(".")
        prefix = f"{folder}." if folder else ""
        for q, k, v in _SEPARATE:
            if last == q and all(f"{prefix}{name}" in names for name in (k, v)):
                paths = [f"{prefix}{name}" for name in (q, k, v)]
                made = [Projection(names[p], p, None) for p in paths]
                yield (made[0], made[1], made[2]), key_heads
        if last in _FUSED and isinstance(weight := getattr(names[path], "weight", None), Tensor):
            outputs = weight.shape[0] if isinstance(names[path], nn.Linear) else weight.shape[1]
            for groups in dict.fromkeys((key_heads, heads, 1)):
                if outputs % (heads + 2 * groups):
                    continue
                width, each = outputs // (heads + 2 * groups), heads // groups
                rows = torch.arange(outputs)
                blocks = torch.split(rows, [heads * width, groups * width, groups * width])
                by_group = rows.view(groups, each + 2, width)
                mixed = [by_group[:, :each], by_group[:, each], by_group[:, each + 1]]
                for parts in (blocks, [part.reshape(-1) for part in mixed]):
                    made = [Projection(names[path], path, part) for part in parts]
                    yield (made[0], made[1], made[2]), groups


def _norms(names: dict[str, nn.Module], probe: _Probe, given: Tensor, wanted: Tensor | None) -> Iterator[Norm | None]:
    """The norms that may lie between the state that enters a layer and its projections."""
    if wanted is None:
        return
    if wanted.shape == given.shape and torch.equal(wanted, given):
        yield None
    for path, module in names.items():
        one, other = probe.inputs.get(path), probe.outputs.get(path)
        if one is not None and other is wanted and one.shape == given.shape and torch.equal(one, given):
            yield from _readings_of_norm(module, one, wanted)


def _norms_behind(
    attention: nn.Module, path: str, probe: _Probe
) -> tuple[tuple[Norm, str] | None, tuple[Norm, str] | None]:
    """The norms behind the query and key projections, and the names of their modules."""
    for pair in _NORMS:
        found = []
        for name in pair:
            module, full = getattr(attention, name, None), f"{path}.{name}" if path else name
            if isinstance(module, nn.Module) and full in probe.outputs:
                given = probe.inputs[full]
                norms = _readings_of_norm(module, given, probe.outputs[full])
                found += [(norm, full) for norm in norms if norm.kind == "rms"][:1]
        if len(found) == 2:
            return found[0], found[1]
    return None, None


def _readings_of_norm(module: nn.Module, given: Tensor, output: Tensor) -> Iterator[Norm]:
    """What a module computes as a norm of its last dimension, if it is one."""
    weight, bias = (None if (x := getattr(module, n, None)) is None else _plain(x) for n in ("weight", "bias"))
    if weight is not None and weight.shape != given.shape[-1:]:
        return
    eps = next(
        (float(e) for n in ("variance_epsilon", "eps", "epsilon") if (e := getattr(module, n, None)) is not None), 0.0
    )
    weights = [weight] if weight is None else [weight, 1 + weight]
    kinds: Iterable[Literal["rms", "layer"]] = (
        ("layer", "rms") if isinstance(module, nn.LayerNorm) else ("rms", "layer")
    )
    close = max(1e-5, 4 * float(torch.finfo(output.dtype).eps))
    for kind, one in product(kinds, weights):
        norm = Norm(kind, one, bias, eps)
        if float((norm(given.float()) - output.float()).abs().max()) <= close * float(output.float().abs().max()):
            yield norm


def _rotaries(model: Any, width: int) -> Iterator[Rotary | None]:
    """The rotary embeddings that a model may use."""
    seen: list[Rotary] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or not 0 < 2 * len(buffer) <= width:
                continue
            own = name.removesuffix("inv_freq")
            scaling = float(getattr(module, f"{own}attention_scaling", 1.0))
            if not any(torch.equal(r.inv_freq, buffer) and r.scaling == scaling for r in seen):
                seen.append(Rotary(buffer.detach().float().clone(), scaling, False))
    yield from seen
    yield from (replace(rotary, interleaved=True) for rotary in seen)
    yield None


def _check_window(
    model: Any, module: nn.Module, layer: int, context: int | None, where: str, error: type[Exception]
) -> None:
    """`error` if a layer does not see all of a context."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    kind = types[layer] if isinstance(types, (list, tuple)) and layer < len(types) else None
    if kind is not None and kind not in _SLIDING:
        windows = []
    else:
        windows = [getattr(m, n, None) for m in (config, *module.modules()) for n in _WINDOWS]
    if getattr(config, "use_sliding_window", None) is False and kind is None:
        windows = []
    shortest = min((w for w in windows if isinstance(w, int) and not isinstance(w, bool) and w > 0), default=None)
    if shortest is not None and (context is None or shortest < context):
        raise error(
            f"{where}: it attends to the last {shortest} positions only; expected all of the context "
            f"({context or 'any length'}). Use a shorter --context, or another layer."
        )
    # Llama 4, where there is no rotary embedding; its code counts positions itself, which no probe can show
    scaled = next((m for m in module.modules() if getattr(m, "attn_temperature_tuning", False)), None)
    if scaled is not None and not getattr(scaled, "use_rope", False):
        floor = int(getattr(scaled, "floor_scale", 1))
        if context is None or context >= floor:
            raise error(
                f"{where}: it scales queries by their position from {floor} positions on; expected a context below "
                f"that ({context or 'any length'})."
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        limit = one.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if one.get("rope_type") in ("dynamic", "longrope") and limit and (context is None or context > limit):
            raise error(
                f"{where}: its rotary embedding changes beyond {limit} positions ({one['rope_type']}); expected a "
                f"context of at most that ({context or 'any length'})."
            )


def _plain(parameter: Any) -> Tensor:
    """A parameter as a float32 tensor, whole."""
    value = parameter.full_tensor() if is_dtensor(parameter) else parameter
    result: Tensor = value.detach().float()
    return result
