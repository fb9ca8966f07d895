"""How alike the inner states of a student and the features of a cache are: linear CKA, in one pass over a slice of it.

CKA (Kornblith et al., 2019) is the HSIC of two Gram matrices over that of each with itself: 1 for states that are equal
up to a rotation and a factor. Of few positions with many components, the usual HSIC is far too high; here it is the
unbiased one (Song et al., 2012) of a batch of positions, averaged over batches (Nguyen et al., 2021), so that nothing
larger than `[ROWS, ROWS]` per state is kept. States are divided by their root mean square, as the cache stores them: a
few huge ones (attention sinks) would decide otherwise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..cache.reader import Cache
from ..data.examples import Examples
from ..errors import TrainError
from ..kernels import HiddenTargets
from ..models.taps import Taps
from ..stream.batch import AnyBatch
from ..stream.cached import CachedSource
from ..utils.intervals import t_quantile
from ..utils.text import format_table
from .matching import DEFAULT_LOSS, Match
from .student import Student

Floats = NDArray[np.float64]
ROWS = 512  # vectors compared with each other
_LEAST = 16  # of a batch that is not left out
_MICRO_TOKENS = 4096
POSITIONS = 4096


@dataclass(frozen=True, eq=False)
class Similarity:
    """CKA between places of a student and features of a cache.

    features, kinds: names, and the kind of each. places: the number of the layer that a state enters, or a module.
    values `[places, features]`: CKA; NaN where shapes do not allow a comparison. halves: half of each one's 95%
    interval (jackknife over batches; infinite for a single one). vectors: compared, of each feature. layers: of the
    student; 0 if it has no list of them.
    """

    features: tuple[str, ...]
    kinds: tuple[str, ...]
    places: tuple[str, ...]
    values: Floats
    halves: Floats
    vectors: tuple[int, ...]
    layers: int = 0

    @property
    def best(self) -> dict[str, str]:
        """The place that is most like each feature, without features that no place can be compared with."""
        columns = ((name, self.values[:, i]) for i, name in enumerate(self.features))
        return {name: self.places[int(np.nanargmax(x))] for name, x in columns if not np.isnan(x).all()}

    @property
    def matches(self) -> list[Match]:
        """These as entries of `--match`, with the usual loss of each kind."""
        kinds = dict(zip(self.features, self.kinds, strict=True))
        return [Match(name, place, DEFAULT_LOSS[kinds[name]]) for name, place in self.best.items()]

    @property
    def text(self) -> str:
        """The table, and the option to paste."""
        best, rows = self.best, []
        for place, values, halves in zip(self.places, self.values, self.halves, strict=True):
            cells = [
                "" if math.isnan(value) else _cell(value, half) + (" *" if best[name] == place else "  ")
                for name, value, half in zip(self.features, values, halves, strict=True)
            ]
            final = " (final norm)" if self.layers and place == str(self.layers) else ""
            rows.append((f"  {place}{final}", *cells))
        entries = " ".join(map(str, self.matches))
        return "\n".join([
            f"linear CKA of {max(self.vectors, default=0):,} positions, debiased; *: the highest of a feature; ±: 95%",
            *format_table([("student \\ cache", *(f"{name}  " for name in self.features)), *rows]),
            f"--match {entries}" if entries else "No part of the student has the shape of one of these features.",
        ])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        def table(values: Floats) -> dict[str, dict[str, float | None]]:
            return {
                name: {
                    place: float(x) if math.isfinite(x) else None for place, x in zip(self.places, column, strict=True)
                }
                for name, column in zip(self.features, values.T, strict=True)
            }

        return {
            "vectors": dict(zip(self.features, self.vectors, strict=True)),
            "cka": table(self.values),
            "half": table(self.halves),
            "best": self.best,
            "match": [str(match) for match in self.matches],
        }


class Hsic:
    """Unbiased HSIC of pairs of Gram matrices, summed over batches: one feature against all places."""

    def __init__(self) -> None:
        self.vectors = 0
        self._batches: list[Tensor] = []  # [3, places]: place with feature, place with itself, feature with itself

    def add(self, ours: Sequence[Tensor | None], theirs_nW: Tensor) -> None:
        """A batch of n vectors: of each place `[n, D]`, None for one that cannot be compared, and of the feature."""
        theirs = _centered(theirs_nW)
        found = torch.full((3, len(ours)), math.nan, dtype=torch.float64)
        for i, one_nD in enumerate(ours):
            if one_nD is not None:
                centered = _centered(one_nD)
                pairs = (centered, theirs), (centered, centered), (theirs, theirs)
                found[:, i] = torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]).cpu()
        n = len(theirs_nW)
        self._batches.append(found / (n * (n - 3)))
        self.vectors += n

    def cka(self) -> tuple[Floats, Floats]:
        """CKA of each place, and half of its 95% interval."""
        batches_B3P = torch.stack(self._batches)
        total, count = batches_B3P.sum(0), len(batches_B3P)
        value = _ratio(total)
        if count < 2:
            return value.numpy(), np.full(len(value), math.inf)
        without_BP = _ratio((total - batches_B3P).movedim(1, 0))
        error = ((count - 1) / count * (without_BP - without_BP.mean(0)).square().sum(0)).sqrt()
        return value.numpy(), t_quantile(count - 1) * error.numpy()


def similarity(
    student: Student,
    cache: Cache,
    *,
    features: Sequence[str] = (),
    positions: int = POSITIONS,
    data: Examples | None = None,
    seed: int = 0,
    allow_partial: bool = False,
) -> Similarity:
    """Run a student on a slice of a cache's inputs, and compare its inner states with the features there.

    features: names; all by default. positions: about how many vectors of each. data: of a cache of examples. seed: of
    the slice. Raises TrainError if the cache has no features, and StreamError if one cannot be read.
    """
    given = list(features or cache.features)
    if not given:
        raise TrainError(
            f"{cache!r} has no features to compare with. Add them with the command of its capture and --features."
        )
    source = CachedSource(
        cache, features=given, batch_tokens=_MICRO_TOKENS, micro_tokens=_MICRO_TOKENS, seed=seed, data=data,
        device=next(student.parameters()).device, allow_partial=allow_partial,
    )  # fmt: skip
    specs = {name: cache.features[name].spec for name in given}
    sums = {name: Hsic() for name in given}
    random = torch.Generator().manual_seed(seed)
    places: list[str] = []
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        for batch in _batches(source):
            places = places or _places(student, batch, specs)
            values = _inner(student, batch, places)
            for name, spec in specs.items():
                for rows in _chosen(batch.features[name], positions - sums[name].vectors, random):
                    sums[name].add([_vectors(values[p], spec, rows) for p in places], rows.coordinates())
            if all(positions - one.vectors < _LEAST for one in sums.values()):
                break
    finally:
        source.close()
        for module, mode in modes:
            module.training = mode
    if empty := [name for name, one in sums.items() if not one.vectors]:
        raise TrainError(f"{cache!r}: no batch has {_LEAST} positions of feature {empty[0]}; nothing can be compared.")
    found = [one.cka() for one in sums.values()]
    return Similarity(
        features=tuple(given),
        kinds=tuple(spec.kind for spec in specs.values()),
        places=tuple(places),
        values=np.stack([values for values, _ in found], 1),
        halves=np.stack([halves for _, halves in found], 1),
        vectors=tuple(one.vectors for one in sums.values()),
        layers=len(student.layers),
    )


def _batches(source: CachedSource) -> Iterator[AnyBatch]:
    """The micro-batches of an epoch."""
    for step in source:
        yield from step.micro_batches


def _places(student: Student, batch: AnyBatch, specs: Mapping[str, Any]) -> list[str]:
    """What of a student is compared: the states that enter its layers and the final norm; for maps, modules without
    inner ones that return maps, and those with the name of a feature."""
    places = []
    if any(spec.kind == "state" for spec in specs.values()) and (layers := len(student.layers)):
        places = [str(number) for number in range(layers + 1)]
    if all(spec.kind == "state" for spec in specs.values()):
        return places
    named = {name.removesuffix(":at") for name in specs}
    modules = [
        name
        for name, m in student.network.named_modules()
        if name and (name in named or not any(True for _ in m.children()))
    ]
    shapes = _recorded(student, batch, modules)
    return places + [name for name in modules if name in shapes and shapes[name].ndim == 4]


def _inner(student: Student, batch: AnyBatch, places: Sequence[str]) -> dict[str, Tensor]:
    """The inner states of a forward."""
    values = _recorded(student, batch, places)
    if missing := [place for place in places if place not in values]:
        raise TrainError(f"{student.name}: module {missing[0]} was not called in the forward.")
    return values


@torch.no_grad()
def _recorded(student: Student, batch: AnyBatch, places: Sequence[str]) -> dict[str, Tensor]:
    none = torch.zeros(0, dtype=torch.int64, device=batch.device)  # rows of logits
    with Taps(student.network, places, TrainError) as taps:
        student.logits(batch, rows=none)
    return taps.values


def _chosen(targets: HiddenTargets, most: int, random: torch.Generator) -> Iterator[HiddenTargets]:
    """At most so many of the vectors, drawn at random, in groups of at least `_LEAST` and at most `ROWS`."""
    drawn = torch.randperm(len(targets), generator=random)[: max(0, most)]
    for rows in torch.split(drawn, ROWS):
        if len(rows) >= _LEAST:
            yield targets.take(rows.sort().values.to(targets.codes.device))


def _vectors(value: Tensor, spec: Any, targets: HiddenTargets) -> Tensor | None:
    """A place's vectors `[n, D]` at the positions of a feature's, with a root mean square of 1; None if it has another
    kind of value. Maps of another size are averaged, as the losses do."""
    if spec.kind == "state":
        flat = value.flatten(0, -2) if value.ndim in (2, 3) else None
    elif value.ndim != 4:
        flat = None
    elif spec.kind == "map":
        flat = adaptive_avg_pool2d(value, spec.shape[-2:]).permute(0, 2, 3, 1).flatten(0, 2)
    else:
        flat = adaptive_avg_pool2d(value.square().mean(1, keepdim=True), spec.shape[-2:]).flatten(1)
    if flat is None:
        return None
    found: Tensor = flat[targets.index].float()
    return found / found.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def _centered(x_nD: Tensor) -> Tensor:
    """The Gram matrix `[n, n]`, whose rows, columns and diagonal are made to sum to 0 (U-centring, Székely & Rizzo,
    2014): the sum of the products of two of them, over n (n − 3), is the unbiased HSIC."""
    n = len(x_nD)
    x = x_nD - x_nD.mean(0)  # changes nothing but rounding
    gram = (x @ x.T).fill_diagonal_(0.0)
    rows = gram.sum(1) / (n - 2)
    gram = gram - rows[:, None] - rows[None, :] + gram.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0.0)


def _ratio(hsic_3P: Tensor) -> Tensor:
    both, ours, theirs = hsic_3P.unbind()
    cka: Tensor = both / (ours * theirs).clamp(min=0.0).sqrt()
    return cka


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(value: float, half: float) -> str:
    return f"{value:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")
