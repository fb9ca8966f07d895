"""The hidden states of a cache that an export writes, and the final norm of its teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..cache.errors import type_name
from ..errors import ExportError
from ..models.final_norm import find_final_norm
from ..settings import ModelSettings
from ..teachers.hf import HFTeacher
from ..teachers.load import load_teacher

LAST = "-1"


def select(cache: Any, names: Sequence[str]) -> list[Any]:
    """The features to export, the final one last. ExportError unless all are states of all positions of all shards."""
    there = {name: spec for name in cache.features if (spec := cache.features[name].spec).kind == "state"}
    listed = ", ".join(there) or "none"
    names = [part.strip() for text in names for part in text.split(",") if part.strip()]
    wanted = [name for name in (names or sorted(there, key=lambda name: there[name].layer)) if name != LAST]
    found: list[Any] = []
    for name in (*wanted, LAST):
        try:
            feature = cache.features[name]
        except KeyError as error:
            raise ExportError(
                f"features: {cache!r} has no states of {name} (it has {listed}). Capture them into it with the "
                f"capture's own command and --features {','.join((*wanted, LAST))}."
            ) from error
        if feature.spec.kind != "state" or feature.spec.positions != "all":
            got = f"{feature.spec.kind}s of {feature.spec.positions} positions"
            raise ExportError(f"features: {name}: got {got}; expected states of all positions.")
        missing = sorted(set(cache.shards) - set(feature.shards))
        if missing:
            raise ExportError(
                f"features: {name}: {len(missing):,} of the {len(cache.shards):,} shards "
                f"{'is' if len(missing) == 1 else 'are'} missing (the first is {missing[0]}). Run the "
                "capture of the features again; it writes only what is missing."
            )
        if feature.name in [other.name for other in found]:
            raise ExportError(f"features: got {name} twice; expected different layers.")
        found.append(feature)
    return found


def final_norm(cache: Any, teacher: Any, settings: ModelSettings | None, to: str) -> nn.Module:
    """The final norm of the cache's teacher."""
    if teacher is None:
        raise ExportError(
            f"teacher: {to} stores the states after the teacher's final norm, and the cache has those before it. "
            "Name the teacher: a folder, a GGUF file or a Hub name."
        )
    found = load_teacher(teacher, settings or ModelSettings()) if isinstance(teacher, (str, Path)) else teacher
    if not isinstance(found, HFTeacher):
        raise ExportError(f"teacher: got {type_name(found)}; expected a causal model of transformers.")
    _same_weights(cache.spec.teacher, found.fingerprint)
    return find_final_norm(found.model)


def _same_weights(captured: str, given: str) -> None:
    """ExportError if two fingerprints name different weights."""
    one, other = (
        next((part for part in text.split(", ") if part.startswith("sha256 ")), None) for text in (captured, given)
    )
    if one and other and one != other:
        raise ExportError(f"teacher: got other weights ({other[:19]}…); expected those of the capture ({one[:19]}…).")
