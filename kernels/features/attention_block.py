"""AttentionBlock: what of a layer turns the state that enters it into queries, keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm
from torch.utils.weak import WeakTensorKeyDictionary

from ..arguments import describe
from ..autocast import without_autocast
from ..errors import KDError
from ..fields import FLOATS, INTEGERS, Field, TensorFields
from .attention import QueriesKeysValues, split_heads
from .targets import HiddenTargets

NORMS = ("rms", "layer", "none")
PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class AttentionBlock(TensorFields):
    """The first half of an attention layer: norm, projections, q/k norms and rotary embedding.

    query `[H d, D]`: weight of the projection; `query_bias` or None. So are key and value, `[G d, D]`.
    heads, key_heads: H and G. Each of the G key heads serves H / G consecutive query heads.
    norm: of the state x. "rms": x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019); "layer": (x − mean) /
        sqrt(variance + eps) · weight + bias; "none". `norm_weight` `[D]` is the factor itself (of Gemma, 1 + its
        weight), None: 1.
    query_norm, key_norm: weights of RMS norms of queries and keys before the rotary embedding, of each head (`[d]`),
    or of
        all heads together (`[H d]`, `[G d]`); None: no such norm. head_eps: their eps.
    inv_freq `[R / 2]`: the angles of the rotary embedding per position, of the first R components of each head (Su et
    al.
        2021); None: no rotary embedding. rotary_scale: a factor of its cosines and sines (YaRN). interleaved: it
        rotates components 2i and 2i + 1, instead of i and i + R / 2.
    scale, softcap: of the logits; see `QueriesKeysValues`.

    Raises KDError if shapes or settings do not fit together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    key_heads: int
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    inv_freq: Tensor | None = None
    norm: Literal["rms", "layer", "none"] = "rms"
    eps: float = 1e-6
    head_eps: float = 1e-6
    rotary_scale: float = 1.0
    interleaved: bool = False
    scale: float | None = None
    softcap: float | None = None

    # dimensions: Q = H d, K = G d, V = G times the width of a value, D components of a state, R / 2 = F
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field("query", torch.float32, 0, "QD"),
        Field("key", torch.float32, 0, "KD"),
        Field("value", torch.float32, 0, "VD"),
        Field("norm_weight", torch.float32, 1, "D", optional=True),
        Field("norm_bias", torch.float32, 0, "D", optional=True),
        Field("query_bias", torch.float32, 0, "Q", optional=True),
        Field("key_bias", torch.float32, 0, "K", optional=True),
        Field("value_bias", torch.float32, 0, "V", optional=True),
        Field("query_norm", torch.float32, 1, "A", optional=True),
        Field("key_norm", torch.float32, 1, "B", optional=True),
        Field("inv_freq", torch.float32, 0, "F", optional=True),
    )
    NAME: ClassVar[str] = "attention block"

    def __post_init__(self) -> None:
        self._check_tensors()
        for name in PROJECTIONS:
            if (weight := getattr(self, name)).ndim != 2:
                got = tuple(weight.shape)
                raise KDError(f"{self.NAME}.{name}: got shape {got}; expected (components of heads, of a state).")
        self._check_settings()
        sizes = {letter: getattr(self, name).shape[0] for letter, name in zip("QKV", PROJECTIONS, strict=True)}
        for name, letter, rows in (("query_norm", "A", "Q"), ("key_norm", "B", "K")):
            weight = getattr(self, name)
            whole = weight is not None and weight.shape == (sizes[rows],)
            sizes[letter] = sizes[rows] if whole else self.head_dim
        rotated = 0 if self.inv_freq is None else self.inv_freq.numel()
        if 2 * rotated > self.head_dim:
            raise KDError(f"inv_freq: got {rotated} angles for heads of {self.head_dim}; expected at most half of it.")
        self._check_fields(sizes | {"D": self.query.shape[1], "F": rotated})

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # not what is folded

    def _check_settings(self) -> None:
        for name in ("heads", "key_heads"):
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) < 1:
                raise KDError(f"{name}: got {getattr(self, name)!r}; expected a positive integer.")
        q, k, v = (getattr(self, name).shape[0] for name in PROJECTIONS)
        fits = not (self.heads % self.key_heads or q % self.heads or v % self.key_heads)
        if not fits or k * self.heads != q * self.key_heads:
            got = f"{self.heads} query and {self.key_heads} key heads for projections of {q}, {k} and {v} rows"
            raise KDError(f"heads: got {got}; expected heads of one width, and key heads that divide the query heads.")
        if self.norm not in NORMS:
            raise KDError(f"norm: got {self.norm!r}; expected one of {', '.join(NORMS)}.")
        if self.norm == "none" and (self.norm_weight is not None or self.norm_bias is not None):
            raise KDError("norm: got 'none' with a weight or bias of the norm; expected neither.")
        for name, least in (("eps", 0.0), ("head_eps", 0.0), ("rotary_scale", 0.0), ("scale", None), ("softcap", 0.0)):
            value = getattr(self, name)
            optional = value is None and name in ("scale", "softcap")
            if not optional and (
                not isinstance(value, Real) or not (-inf if least is None else least) <= float(value) < inf
            ):
                raise KDError(f"{name}: got {value!r}; expected a number.")
        if self.softcap == 0:
            raise KDError("softcap: got 0; expected a positive number, or None.")
        if not isinstance(self.interleaved, bool):
            raise KDError(f"interleaved: got {self.interleaved!r}; expected True or False.")

    @property
    def head_dim(self) -> int:
        """d, the components of a head."""
        return self.query.shape[0] // self.heads

    @property
    def width(self) -> int:
        """D, the components of a state."""
        return self.query.shape[1]

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and the settings in values that JSON can hold: what a file keeps."""
        names = {field.name for field in self.FIELDS}
        tensors = {name: x for name in sorted(names) if (x := getattr(self, name)) is not None}
        return tensors, {f.name: getattr(self, f.name) for f in fields(self) if f.name not in names}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "AttentionBlock":
        """The block of such parts. KDError for a name that it does not have, or one that is missing."""
        given, known = {**tensors, **settings}, {f.name for f in fields(cls)}
        needed = {*PROJECTIONS, "heads", "key_heads"}
        if (unknown := sorted(set(given) - known)) or (missing := sorted(needed - set(given))):
            problem = f"an unknown {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
            raise KDError(f"attention block: got {problem}; expected some of {', '.join(sorted(known))}.")
        return cls(**given)

    def queries_keys_values(
        self,
        states: HiddenTargets | Tensor,
        position_ids: Tensor | None = None,
        *,
        values: bool = True,
        rotary: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> QueriesKeysValues:
        """Queries, keys and values of the states that enter the layer.

        states: HiddenTargets, or a tensor `[N, D]`. Of targets, the rotation of their basis is folded into the weights,
            once for each basis: coordinates are projected as they are.
        position_ids `[N]`: the position of each state in its sequence; for the rotary embedding.
        values=False leaves the values out. rotary=False leaves queries and keys as the projections (and norms) return
            them. dtype: of the results.

        KDError if widths or positions do not fit.
        """
        width = states.width if isinstance(states, HiddenTargets) else states.shape[-1]
        if isinstance(states, Tensor) and (states.ndim != 2 or states.dtype not in FLOATS):
            raise KDError(f"states: got {describe(states)}; expected HiddenTargets or a tensor (rows, components).")
        if width != self.width:
            raise KDError(f"states: got {width} components; expected {self.width}, as the layer takes.")
        rows, use_rotary = len(states), rotary and self.inv_freq is not None
        if use_rotary and (position_ids is None or tuple(position_ids.shape) != (rows,)):
            got = None if position_ids is None else tuple(position_ids.shape)
            raise KDError(f"position_ids: got {got}; expected a position for each of {rows} states.")
        if use_rotary and position_ids is not None and position_ids.dtype not in INTEGERS:
            raise KDError(f"position_ids: got {position_ids.dtype}; expected whole numbers.")
        wanted = 3 if values else 2
        project = self._from_coordinates if isinstance(states, HiddenTargets) else self._from_states
        with without_autocast(states.device):
            projected = project(states, wanted, dtype)  # type: ignore[arg-type]
        queries = self._of_heads(projected[0], self.heads, self.query_norm)
        keys = self._of_heads(projected[1], self.key_heads, self.key_norm)
        if use_rotary:
            assert position_ids is not None
            cos, sin = self._angles(position_ids, dtype)
            queries, keys = self._rotate(queries, cos, sin), self._rotate(keys, cos, sin)
        of_value = split_heads(projected[2], self.key_heads) if values else None
        return QueriesKeysValues(queries, keys, of_value, self.scale, self.softcap)

    def _from_states(self, states: Tensor, wanted: int, dtype: torch.dtype) -> list[Tensor]:
        x = states.to(dtype)
        weight, bias = (None if w is None else w.to(dtype) for w in (self.norm_weight, self.norm_bias))
        if self.norm == "rms":
            x = rms_norm(x, (self.width,), weight, self.eps)
            x = x if bias is None else x + bias
        elif self.norm == "layer":
            x = layer_norm(x, (self.width,), weight, bias, self.eps)
        results = []
        for name in PROJECTIONS[:wanted]:
            bias = getattr(self, f"{name}_bias")
            results.append(linear(x, getattr(self, name).to(dtype), None if bias is None else bias.to(dtype)))
        return results

    def _from_coordinates(self, targets: HiddenTargets, wanted: int, dtype: torch.dtype) -> list[Tensor]:
        """With x = s · z @ basisᵀ, rms(x) = s · rms(z), so a norm of x is a factor of each row of z: from s it needs
        eps / s² alone."""
        weight, bias, mean = self._folded_for(targets.basis, dtype)
        lengths = [getattr(self, name).shape[0] for name in PROJECTIONS[:wanted]]
        z, s = targets.coordinates(dtype=dtype), targets.scales(dtype=dtype)
        if self.norm == "none":
            factor = s
        else:
            variance = z.square().mean(1)
            if self.norm == "layer":
                variance -= (z @ mean).square()
            factor = (variance + self.eps / s.square()).rsqrt()
        projected = linear(z, weight[: sum(lengths)]).mul_(factor[:, None])
        if bias is not None:
            projected += bias[: sum(lengths)]
        return list(projected.split_with_sizes(lengths, 1))

    def _folded_for(self, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weights `[(H + 2 G) d, D]` that take coordinates; the bias; and what z is multiplied with for the mean of
        r."""
        per_basis: WeakTensorKeyDictionary = self.__dict__.setdefault("_folded", WeakTensorKeyDictionary())
        if basis not in per_basis:
            per_basis[basis] = {}
        by_type = per_basis[basis]
        if dtype not in by_type:
            to, b = torch.float64, basis.to(torch.float64)
            weight = torch.cat([getattr(self, name).to(to) for name in PROJECTIONS])
            biases = [getattr(self, f"{name}_bias") for name in PROJECTIONS]
            bias = torch.cat(
                [
                    weight.new_zeros(getattr(self, name).shape[0]) if x is None else x.to(to)
                    for name, x in zip(PROJECTIONS, biases, strict=True)
                ]
            )
            if self.norm_bias is not None:
                bias = bias + weight @ self.norm_bias.to(to)
            if self.norm_weight is not None:
                weight = weight * self.norm_weight.to(to)
            if self.norm == "layer":
                weight = weight - weight.mean(1, keepdim=True)
            has_bias = self.norm_bias is not None or any(x is not None for x in biases)
            by_type[dtype] = (
                (weight @ b).to(dtype), bias.to(dtype) if has_bias else None, b.mean(0).to(dtype),
            )  # fmt: skip
        found: tuple[Tensor, Tensor | None, Tensor] = by_type[dtype]
        return found

    def _of_heads(self, x_NQ: Tensor, heads: int, norm: Tensor | None) -> Tensor:
        """Vectors of each head `[N, heads, d]`, normalised if there is such a norm."""
        if norm is not None and norm.shape[0] == x_NQ.shape[1]:
            x_NQ = rms_norm(x_NQ, norm.shape, norm.to(x_NQ.dtype), self.head_eps)
        x_NHd = split_heads(x_NQ, heads)
        if norm is not None and norm.shape[0] != x_NQ.shape[1]:
            x_NHd = rms_norm(x_NHd, norm.shape, norm.to(x_NQ.dtype), self.head_eps)
        return x_NHd

    def _angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, 1, R / 2]`, of angles in float32, as models compute them."""
        assert self.inv_freq is not None
        angles = position_ids[:, None, None].float() * self.inv_freq.float()
        return (angles.cos() * self.rotary_scale).to(dtype), (angles.sin() * self.rotary_scale).to(dtype)

    def _rotate(self, x_NHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        rotated, rest = x_NHd[..., : 2 * half], x_NHd[..., 2 * half :]
        if self.interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = rotated[..., :half], rotated[..., half:]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
