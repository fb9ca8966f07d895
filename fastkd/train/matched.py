"""The objective of a training that matches features: TokenKD, and a term for each entry of `match`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..cache.errors import StoreError
from ..data.examples import Examples
from ..errors import TrainError
from ..kernels import KDError, find_feature_loss
from ..kernels.features.losses import FeatureLoss, feature_loss_names
from ..models.attention import from_bytes
from ..models.pruned import original_layers
from ..settings import TrainSettings
from ..stream.split import plan_of
from .matching import OF_ATTENTION, Match, StudentLayers, parse, resolve
from .objective import AUTO, Objective, TokenKD, WeightedSum
from .objectives.attention import AttentionKD, RelationKD
from .objectives.hidden import HiddenKD
from .objectives.projector import LinearProjector, MapProjector
from .student import PROBE, Student

TOKEN = "answers"  # "token": would be masked as a credential
"""The name of the term that learns from the teacher's answers."""


def matched_objective(
    settings: TrainSettings,
    caches: Any,
    student: Student,
    *,
    objective: Objective | None = None,
    data: Examples | None = None,
) -> WeightedSum:
    """The sum of a training with `settings.match`. Notes on what auto chose are added to the student's.

    caches: of the source; the features of a mixture are alike in all of them (`CachedSource`). objective: instead of
    the TokenKD of the settings. data: for caches of examples. Raises TrainError for what cannot be matched.
    """
    if not caches:
        raise TrainError(
            f"match: got {', '.join(settings.match)}, and a batch source; expected a cache. Pass the terms as an "
            "objective instead (WeightedSum, HiddenKD)."
        )
    features = _features(caches[0], settings.match)
    specs = {name: feature.spec for name, feature in features.items()}
    found = resolve(settings.match, specs, student_layers(student), feature_loss_names())
    student.notes += found.notes
    plans = [plan_of(cache) for cache in caches]
    contexts = [n for plan in plans if plan is not None and isinstance(n := plan.settings.get("context"), int)]
    if len(contexts) == len(plans):
        student.context = max(contexts)
    shapes = student.inner_shapes(
        dict.fromkeys(one.output for one in found.matches if one.loss not in OF_ATTENTION), data
    )
    # as precise as the student's weights, and never half
    dtype = torch.promote_types(next(student.model.parameters()).dtype, torch.float32)
    terms: dict[str, Objective] = {TOKEN: TokenKD.from_settings(settings) if objective is None else objective}
    weights: dict[str, Any] = {}
    for one in found.matches:
        name = term_name(one)
        weights[name] = AUTO if one.weight is None else one.weight
        spec = specs[one.teacher]
        if one.loss in OF_ATTENTION:
            terms[name] = _attention(one, spec, features[one.teacher].block)
        else:
            terms[name] = _hidden(one, name, spec, shapes[one.output], settings, dtype)
    return WeightedSum(terms, weights)


def _features(cache: Any, entries: Sequence[str]) -> dict[str, Any]:
    """The features that some entries name, by their names in the cache; all of them if one is not there, or for auto.
    Only that takes a listing, which a web server does not give."""
    named = [entry.teacher for text in entries if isinstance(entry := parse(text), Match)]
    try:
        found = [cache.features[name] for name in named]
    except KeyError:
        found = []
    if len(found) < len(entries):
        try:
            found = [cache.features[name] for name in cache.features]
        except StoreError as error:
            raise TrainError(
                f"match: got {', '.join(entries)}, and the features of {cache!r} cannot be listed; expected entries "
                "that name features that it has."
            ) from error
    return {feature.name: feature for feature in found}


def _attention(match: Match, spec: Any, block: bytes | None) -> AttentionKD:
    if spec.positions != "all":
        raise TrainError(
            f"match: got {str(match)!r}, and feature {spec.name} is of some positions ({spec.positions}); expected "
            "all, as maps are over whole segments. Drop it, and capture it again with feature_positions='all'."
        )
    if not match.output.startswith("attention:"):
        raise TrainError(f"match: got {str(match)!r}; expected the number of a layer of the student, not a module.")
    try:
        made = from_bytes(block or b"")
    except ValueError as error:
        raise TrainError(
            f"match: got {str(match)!r}, and the block of feature {spec.name} is none ({error})."
        ) from error
    if made.width != spec.width:
        raise TrainError(
            f"match: got {str(match)!r}, and the block of feature {spec.name} is of states of {made.width} components; "
            f"expected {spec.width}. Drop the feature, and capture it again."
        )
    make = RelationKD if match.loss == "relation" else AttentionKD
    return make(match.teacher, match.output, made, match.loss)


def student_layers(student: Student) -> StudentLayers:
    """What a student can be matched at."""
    modules = frozenset(name for name, _ in student.network.named_modules() if name)
    return StudentLayers(student.name, len(student.layers), modules, original_layers(student.model))


def term_name(match: Match) -> str:
    """The name of its term, for the log: "hidden/20:16:mse"."""
    kind = match.loss if match.loss in OF_ATTENTION else "hidden"
    return f"{kind}/{match.teacher}:{match.student}:{match.loss}"


def _hidden(
    match: Match, name: str, spec: Any, shape: tuple[int, ...], settings: TrainSettings, dtype: torch.dtype
) -> HiddenKD:
    loss = _loss(match)
    problem = ""
    maps = spec.kind != "state"
    if loss.inputs == "maps" and not maps:
        problem = f"feature {spec.name} is of states; expected one of maps, or a loss of states"
    elif loss.inputs == "states" and maps:
        problem = f"feature {spec.name} is of maps; expected one of states, or a loss of maps"
    elif loss.inputs == "maps" and len(shape) != 4:
        problem = f"the student's {match.output} is {list(shape)}; expected maps [B, C, H, W]"
    elif loss.inputs == "states" and len(shape) != 3:
        problem = f"the student's {match.output} has {len(shape)} dimensions; expected states [B, L, D]"
    elif loss.inputs == "states" and shape[:2] != PROBE:
        problem = f"the student's {match.output} is {list(shape)} for {list(PROBE)} tokens; expected a state of each"
    projector: nn.Module | None = None
    fit = settings.match_init == "least-squares"
    if not problem and loss.projector:
        ours, theirs = (shape[1], spec.shape[0]) if maps else (shape[2], spec.width)
        if settings.match_projector == "linear":
            make = MapProjector if maps else LinearProjector
            projector = make(ours, theirs, seed=settings.seed, name=name, dtype=dtype)
        elif ours != theirs:
            problem = (
                f"the student's {match.output} has {ours} components and the teacher's {theirs}; expected equal ones "
                "without a projector. Use match_projector='linear'"
            )
    if problem:
        raise TrainError(f"match: got {str(match)!r}; {problem}.")
    return HiddenKD(match.teacher, match.output, match.loss, projector=projector, shape=tuple(spec.shape), fit=fit)


def _loss(match: Match) -> FeatureLoss:
    try:
        return find_feature_loss(match.loss)
    except KDError as error:
        raise TrainError(f"match: got {str(match)!r}; {error}") from error


def signals_of(objective: Objective) -> Mapping[str, list[str]]:
    """The signals that an objective reads, by their kinds: {"features": ["20"]}."""
    found: dict[str, list[str]] = {}
    for signal in objective.signals:
        kind, slash, name = signal.partition("/")
        if slash:
            found.setdefault(kind, []).append(name)
    return found
