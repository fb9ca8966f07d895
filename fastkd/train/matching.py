"""Which cached feature is matched by which part of a student: entries TEACHER:STUDENT:LOSS:WEIGHT, and `auto`.

States are named by the layer that they enter, counted from 0; -1 is what enters the final norm. Pure: nothing is read
and no model is run.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import TrainError
from ..models.pruned import OriginalLayers

AUTO = "auto"
OF_ATTENTION = ("attention", "relation")
"""Losses on the attention of a layer: recomputed from the state that enters it, by the block beside the cache."""
DEFAULT_LOSS = {"state": "mse", "map": "hint", "attention_map": "at"}
"""The loss of `auto`, by the kind of a feature."""
_FORM = "TEACHER:STUDENT:LOSS:WEIGHT (such as 20:16:mse:0.1 or layers.3:layers.1:hint:auto), or auto"


class Feature(Protocol):
    """What is read of a feature's spec."""

    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def layers(self) -> int | None: ...
    @property
    def block(self) -> str | None: ...


@dataclass(frozen=True)
class Match:
    """A feature of the teacher, what is to be like it in the student, and how.

    teacher: the feature's name in the cache. student: the number of a layer, for the state that enters it (or for its
    attention, by the loss), or the name of a module. weight: the loss's factor; None: found at the start of the
    training, by the norms of gradients.
    """

    teacher: str
    student: str
    loss: str
    weight: float | None = None

    def __str__(self) -> str:
        """The entry that means this."""
        weight = AUTO if self.weight is None else repr(self.weight)
        return f"{self.teacher}:{self.student}:{self.loss}:{weight.removesuffix('.0')}"

    @property
    def output(self) -> str:
        """The student's output that is compared, as `Objective.outputs` names it."""
        kind = "module" if _integer(self.student) is None else "attention" if self.loss in OF_ATTENTION else "state"
        return f"{kind}:{self.student}"


@dataclass(frozen=True)
class Auto:
    """All features that no other entry names, by the layers' numbers. loss: None for the kind's usual one."""

    loss: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class StudentLayers:
    """What a student can be matched at.

    name: for messages. count: its layers, or 0 without a list of them. modules: names of all modules. original: if it
    is a pruned copy of some model.
    """

    name: str
    count: int
    modules: Collection[str] = ()
    original: OriginalLayers | None = None


@dataclass(frozen=True)
class Matched:
    """matches: what is trained on. notes: for the user, a line each."""

    matches: tuple[Match, ...]
    notes: list[str] = field(default_factory=list)


def parse(text: str) -> Match | Auto:
    """An entry of `--match`. Raises TrainError, saying what was expected.

    Read from the right: a feature's name may end in `:at` (layers.3:at:layers.1:at:100).
    """
    parts = str(text).split(":")
    if parts[0] == AUTO and len(parts) <= 3 and all(parts):
        return Auto(parts[1] if len(parts) > 1 else None, _weight(text, parts[2] if len(parts) > 2 else AUTO))
    if len(parts) == 5 and parts[1] == "at":
        parts[:2] = [f"{parts[0]}:at"]
    if len(parts) != 4 or not all(parts) or parts[0] == AUTO:
        raise TrainError(f"match: got {str(text)!r}; expected {_FORM}.")
    return Match(parts[0], parts[1], parts[2], _weight(text, parts[3]))


def resolve(
    entries: Sequence[str], features: Mapping[str, Feature], student: StudentLayers, losses: Collection[str]
) -> Matched:
    """The matches of these entries, with the names that the cache has for features and layers as numbers from 0 on.

    features: specs by name, of the cache. losses: names that exist. Raises TrainError for a feature that the cache
    lacks, a layer or a module that the student lacks, an unknown loss, a loss of attention without a block, and for
    anything matched twice.
    """
    if not features:
        raise TrainError(
            f"match: got {_listed(entries)}, and the cache has no features. Add them to it with the command of its "
            "capture and --features."
        )
    found: list[Match] = []
    notes: list[str] = []
    autos: list[Auto] = []
    for text in entries:
        entry = parse(text)
        if entry.loss is not None and entry.loss not in losses:
            raise TrainError(f"match: got {text!r}; expected a loss of {', '.join(sorted(losses))}.")
        if isinstance(entry, Auto):
            autos.append(entry)
        else:
            found.append(_resolved(text, entry, features, student))
    if len(autos) > 1:
        raise TrainError(f"match: got {_listed(entries)}; expected auto once.")
    for auto in autos:
        rest = {name: spec for name, spec in features.items() if name not in {match.teacher for match in found}}
        more, said = _automatic(auto, rest, student)
        found, notes = [*found, *more], said
    seen: set[tuple[str, str, str]] = set()
    for match in found:
        if (key := (match.teacher, match.student, match.loss)) in seen:
            raise TrainError(f"match: got {':'.join(key)} twice; expected each once. Leave one of them out.")
        seen.add(key)
    return Matched(tuple(found), notes)


def feature_named(name: str, features: Mapping[str, Feature]) -> str | None:
    """The name in a cache of a feature: -1 and 30 are the same of a teacher with 30 layers. None if it is not there."""
    if name in features or (number := _integer(name)) is None:
        return name if name in features else None
    for own, spec in features.items():
        if spec.kind == "state" and spec.layers is not None and entered(spec) == number % (spec.layers + 1):
            return own if -spec.layers - 1 <= number <= spec.layers else None
    return None


def entered(spec: Feature) -> int:
    """The layer that a state enters, from 0 on; the number of layers for what enters the final norm."""
    assert spec.layer is not None
    assert spec.layers is not None
    return spec.layer if spec.layer >= 0 else spec.layers + 1 + spec.layer


def state_at(layer: int, count: int, student: StudentLayers) -> int:
    """Which state of a student is to be like the one that enters a layer of a teacher with `count` layers, both as the
    layer they enter.

    Of a pruned copy: the one that enters the first layer kept from there on. Otherwise uniformly, last to last.
    """
    if (original := copied(student, count)) is not None:
        return bisect_left(original.layers, layer)
    return _rounded(layer * student.count, count)


def attention_at(layer: int, count: int, student: StudentLayers) -> int:
    """Which layer's attention is to be like that of a layer of a teacher with `count` layers.

    Of a pruned copy: the same layer, or the last one kept before it. Otherwise uniformly, last to last.
    """
    if (original := copied(student, count)) is not None:
        return max(0, bisect_right(original.layers, layer) - 1)
    return _rounded(layer * (student.count - 1), max(1, count - 1))


def copied(student: StudentLayers, count: int) -> OriginalLayers | None:
    """A student's original layers, if those of its original are as many as a teacher's."""
    original = student.original
    fits = original is not None and original.count == count and len(original.layers) == student.count
    return original if fits else None


def _resolved(text: str, match: Match, features: Mapping[str, Feature], student: StudentLayers) -> Match:
    """An entry with the names that cache and student have."""
    teacher = feature_named(match.teacher, features)
    if teacher is None:
        raise TrainError(
            f"match: got {text!r}; expected a feature of the cache, which has {', '.join(features)}. Add others to it "
            "with the command of its capture and --features."
        )
    spec, attention = features[teacher], match.loss in OF_ATTENTION
    if attention:
        _check_block(text, teacher, spec)
    if (number := _integer(match.student)) is None:
        if match.student not in student.modules:
            like = [name for name in student.modules if name.split(".")[-1] == match.student.split(".")[-1] and name]
            listed = f" (it has {', '.join(sorted(like)[:3])})" if like else ""
            raise TrainError(
                f"match: got {text!r}; expected a layer's number, or the name of a module of {student.name}{listed}."
            )
        return Match(teacher, match.student, match.loss, match.weight)
    if not student.count:
        raise TrainError(
            f"match: got {text!r}; {student.name} has no list of layers (an nn.ModuleList of one class) to count; "
            "expected the name of a module."
        )
    # layer count, for a state, is what enters the final norm
    limit = student.count if attention else student.count + 1
    if not -limit <= number < limit:
        last = f"{limit - 1}" if attention else f"{limit - 1} (what enters the final norm)"
        raise TrainError(
            f"match: got {text!r}; {student.name} has {student.count} layers; expected a number from 0 to {last}, or "
            "counted from the end from -1 on."
        )
    return Match(teacher, str(number % limit), match.loss, match.weight)


def _automatic(auto: Auto, features: Mapping[str, Feature], student: StudentLayers) -> tuple[list[Match], list[str]]:
    """Matches of these features, each part of the student once, and notes on those that are left out."""
    chosen: dict[tuple[str, str], tuple[float, str]] = {}  # by student and loss: how far off, and the feature
    left: list[str] = []
    for name, spec in features.items():
        loss = auto.loss or DEFAULT_LOSS[spec.kind]
        for place, off in _places(name, spec, loss, student):
            key = (place, loss)
            if key not in chosen or off <= chosen[key][0]:
                left += [chosen[key][1]] if key in chosen else []
                chosen[key] = (off, name)
            else:
                left.append(name)
            break
        else:
            left.append(name)
    if not chosen:
        raise TrainError(
            f"match: got 'auto', and none of the features {', '.join(features) or '(none is left)'} of the cache has "
            f"an obvious counterpart in {student.name}; expected entries {_FORM.partition(' (')[0]}."
        )
    found = [Match(name, place, loss, auto.weight) for (place, loss), (_, name) in chosen.items()]
    counts = {spec.layers for spec in features.values() if spec.layers is not None}
    how = "by the same module names"
    if counts:
        pruned = all(copied(student, count) is not None for count in counts)
        how = "by the student's original layers" if pruned else "uniformly, last to last"
    notes = [f"match auto ({how}): {' '.join(map(str, found))}"]
    if left:
        notes.append(f"match auto leaves out {', '.join(left)}: nothing else in the student corresponds to them.")
    return found, notes


def _places(name: str, spec: Feature, loss: str, student: StudentLayers) -> Iterator[tuple[str, float]]:
    """The place in the student of a feature, with its distance from an exact one; nothing without a counterpart."""
    if spec.kind != "state":
        if (module := name.removesuffix(":at")) in student.modules:
            yield module, 0.0
        return
    assert spec.layers is not None
    layer = entered(spec)
    if not student.count or (loss in OF_ATTENTION and (layer == spec.layers or spec.block is None)):
        return
    attention = loss in OF_ATTENTION
    place = (attention_at if attention else state_at)(layer, spec.layers, student)
    if (original := copied(student, spec.layers)) is not None:
        exact: float = [*original.layers, spec.layers][place]
        yield str(place), abs(exact - layer)
    else:
        scale = (student.count - 1) / max(1, spec.layers - 1) if attention else student.count / spec.layers
        yield str(place), abs(place - layer * scale)


def _check_block(text: str, teacher: str, spec: Feature) -> None:
    if spec.kind != "state":
        raise TrainError(f"match: got {text!r}; expected the state that enters a layer, from which attention follows.")
    assert spec.layers is not None
    if entered(spec) == spec.layers:
        raise TrainError(f"match: got {text!r}; no layer follows what enters the final norm; expected one before it.")
    if spec.block is None:
        raise TrainError(
            f"match: got {text!r}, and feature {teacher} comes without the weights that attention is recomputed with. "
            "Beside a live teacher, add --feature-block; from a cache, drop it, and capture it again with that option."
        )


def _weight(text: object, weight: str) -> float | None:
    if weight == AUTO:
        return None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise TrainError(f"match: got {str(text)!r}; expected a weight above 0, or auto.")
    return number


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _rounded(numerator: int, denominator: int) -> int:
    """The nearest integer; halves are rounded up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _listed(entries: Sequence[str]) -> str:
    return ", ".join(map(str, entries))
