"""A student's first weights from its teacher's: each layer from the one that it is matched with.

A layer is copied if it then computes what the teacher's does; otherwise it is left as it was, whole. Embeddings, final
norm and LM head are copied where their shapes agree. Where only the hidden sizes differ, the embeddings become the best
approximation of the teacher's of that rank, and an LM head that is not tied to them the least squares from the
student's last states to the teacher's logits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..models.lm_head import MULTIPLIERS, SOFTCAPS
from ..models.pruned import note_original_layers, original_layers
from ..models.taps import layers_of
from ..stream.batch import MicroBatch
from .matching import StudentLayers, copied
from .student import Student

RIDGE = 1e-3  # of the least squares, relative to the mean square of the student's states
_PROBE = 12  # tokens
_LEFT = "left as it was"
_CONTEXT = ("rope_parameters", "rope_theta")  # of a config: what layers get from outside


@dataclass(frozen=True)
class Initialised:
    """What became of a student's parts.

    layers: for each, the teacher's layer that it was copied from, or None if it was left. embedding, norm, lm_head: in
    words. notes: for the user, a line each.
    """

    layers: tuple[int | None, ...]
    embedding: str
    norm: str
    lm_head: str
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        pairs = [f"{i} from {n}" for i, n in enumerate(self.layers) if n is not None]
        left = [str(i) for i, n in enumerate(self.layers) if n is None]
        layers = "; ".join(filter(None, [", ".join(pairs), f"left as it was: {', '.join(left)}" if left else ""]))
        lines = [f"layers: {layers}", f"embeddings: {self.embedding}", f"final norm: {self.norm}"]
        return "\n".join([*lines, f"LM head: {self.lm_head}", *(f"note: {note}" for note in self.notes)])


def sources(student: StudentLayers, count: int, matches: Sequence[tuple[int, int]] = ()) -> list[int]:
    """The layer of a teacher with `count` layers for each layer of a student.

    matches: pairs of the teacher's and the student's states, by the layers that they enter. A layer is to return what
    the teacher's returns: between matched states, layers are spread evenly. A pruned copy has its own layers.
    """
    if (original := copied(student, count)) is not None:
        return list(original.layers)
    points = [(0, 0)]
    for ours, theirs in sorted((ours, theirs) for theirs, ours in matches):
        if points[-1][0] < ours < student.count and points[-1][1] <= theirs <= count:  # not where two cross
            points.append((ours, theirs))
    points.append((student.count, count))
    ours_of, theirs_of = ([float(point[side]) for point in points] for side in (0, 1))
    returned = np.interp(np.arange(1, student.count + 1), ours_of, theirs_of)
    return [max(0, int(np.floor(state + 0.5)) - 1) for state in returned]


@torch.no_grad()
def initialise(
    student: Student, teacher: Any, chosen: Sequence[int], batches: Iterable[MicroBatch] = ()
) -> Initialised:
    """Copy from a teacher what fits; the student is changed.

    teacher: a torch module, or a model of transformers. chosen: its layer for each of the student's (`sources`).
    batches: for the least squares; read only if needed. Raises TrainError if no part fits.
    """
    model: Any = student.model
    ours, theirs = student.layers, layers_of(teacher)
    if not ours or not theirs:
        name = type(teacher).__name__ if ours else student.name
        raise TrainError(f"{name} has no list of layers (an nn.ModuleList of one class); expected two models with one.")
    modes = [(module, module.training) for root in (student, teacher) for module in root.modules()]
    student.eval()
    teacher.eval()
    try:
        notes: list[str] = []
        calls = _calls(teacher, theirs)
        pairs = list(zip(ours, chosen, strict=True))
        copied_ = [_copy_layer(layer, theirs[n], calls[n], f"layer {i}", notes) for i, (layer, n) in enumerate(pairs)]
        layers = tuple(n if done else None for done, (_, n) in zip(copied_, pairs, strict=True))
        ends = [_LEFT] * 3
        if hasattr(model, "get_input_embeddings") and hasattr(teacher, "get_input_embeddings"):
            ends = _ends(model, teacher, batches)
    finally:
        for module, mode in modes:
            module.training = mode
    if not any(copied_) and all(end.startswith(_LEFT) for end in (ends[0], ends[2])):
        raise TrainError(f"{student.name}: nothing of its teacher fits it ({notes[0]}). Train it from its own weights.")
    if any(copied_) and (different := [n for n in _CONTEXT if _of(model, n) != _of(teacher, n)]):
        notes.append(f"{', '.join(different)}: other than the teacher's, so copied layers attend otherwise")
    pruned = all(copied_) and len(ours) < len(theirs) and sorted(set(chosen)) == list(chosen)
    if pruned and hasattr(model, "config") and original_layers(model) is None:  # from now on it is a pruned copy
        note_original_layers(model, list(chosen), len(theirs))
    return Initialised(layers, ends[0], ends[1], ends[2], notes)


def _calls(teacher: Any, layers: Sequence[nn.Module]) -> list[tuple[Any, Any, Tensor]]:
    """Arguments and result of each layer in a forward of the teacher on a few tokens."""
    found: dict[int, tuple[Any, Any, Tensor]] = {}

    def record(layer: nn.Module, given: Any, named: Any, result: Any) -> None:
        found[id(layer)] = (given, named, _first(result).clone())

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        device = next(teacher.parameters()).device
        tokens = torch.arange(1, _PROBE + 1, device=device)[None]
        teacher(tokens, **({"use_cache": False} if hasattr(teacher, "get_input_embeddings") else {}))
    finally:
        for handle in handles:
            handle.remove()
    return [found[id(layer)] for layer in layers]


def _copy_layer(ours: nn.Module, theirs: nn.Module, call: tuple[Any, Any, Tensor], name: str, notes: list[str]) -> bool:
    """Copy a layer's parameters, and prove that it now returns what the teacher's does; else it stays as it was."""
    own, other = ours.state_dict(), theirs.state_dict()
    shapes, expected = ({n: tuple(x.shape) for n, x in state.items()} for state in (own, other))
    if shapes != expected:
        differ = [n for n in sorted({*shapes, *expected}) if shapes.get(n) != expected.get(n)]
        what = f"{differ[0]} is {shapes.get(differ[0], 'absent')}, the teacher's {expected.get(differ[0], 'absent')}"
        _once(notes, f"{name} was left as it was: its {what}")
        return False
    before = {n: x.clone() for n, x in own.items()}
    ours.load_state_dict({n: x.to(own[n].dtype) for n, x in other.items()})
    given, named, result = call
    try:
        found = _first(ours(*given, **named))
        same = bool(((found - result).abs() <= 1e-3 * result.abs().max().clamp(min=1e-6)).all())
    except Exception:  # of other arguments
        same = False
    if not same:
        ours.load_state_dict(before)
        _once(notes, f"{name} was left as it was: with the teacher's weights it returns something else")
    return same


def _ends(model: Any, teacher: Any, batches: Iterable[MicroBatch]) -> list[str]:
    """Embeddings, final norm and LM head of models of transformers: what was done, in words."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = teacher.get_input_embeddings().weight.float(), teacher.get_output_embeddings()
    tied = outer is not None and outer.weight is inner.weight
    (count, width), (rows, other) = embedding.shape, inner.weight.shape
    if rows < count:
        return [f"{_LEFT}, with {rows} rows for {count} tokens"] * 3
    if other == width:
        inner.weight[:count] = embedding
        said = "copied"
    elif other < width:
        # the best approximation of rank `other` (Eckart & Young, 1936): E ≈ (E V) Vᵀ
        _, vectors = torch.linalg.eigh((embedding.T @ embedding).double())
        inner.weight[:count] = embedding @ vectors[:, -other:].flip(1).float()
        kept = float(inner.weight[:count].square().sum() / embedding.square().sum())
        said = f"by least squares, {other} of {width} components with {kept:.1%} of the squares"
    else:
        said = f"{_LEFT}, with {other} components for {width}"
    norm = _copy_norm(model, teacher)
    if tied:
        return [said, norm, "tied to the embeddings"]
    if outer is None or head is None or len(outer.weight) < len(head.weight):
        return [said, norm, _LEFT]
    if outer.weight.shape[1] == head.weight.shape[1]:
        outer.weight[: len(head.weight)] = head.weight
        if outer.bias is not None and head.bias is not None:
            outer.bias[: len(head.bias)] = head.bias
        return [said, norm, "copied"]
    if not (_plain(model, outer) and _plain(teacher, head)):
        return [said, norm, f"{_LEFT}: logits are more than a product with it"]
    return [said, norm, _fit_head(model, teacher, outer, head, batches)]


def _fit_head(model: Any, teacher: Any, outer: Any, head: Any, batches: Iterable[MicroBatch]) -> str:
    """The LM head W that minimizes ‖S Wᵀ − X Hᵀ‖² for the last states S of the student and X of the teacher, whose LM
    head is H: W = H Xᵀ S (Sᵀ S)⁻¹."""
    width = outer.weight.shape[1]
    ours = torch.zeros(width, width, dtype=torch.float64)
    both = torch.zeros(head.weight.shape[1], width, dtype=torch.float64)
    count = 0
    for batch in batches:
        real = batch.padding_mask().flatten()
        given = {"input_ids": batch.input_ids, "use_cache": False}
        s, x = (m.base_model(**given).last_hidden_state.flatten(0, 1)[real].double().cpu() for m in (model, teacher))
        ours += s.T @ s
        both += x.T @ s
        count += len(s)
    if count < 2 * width:
        return f"{_LEFT}: {count} positions are too few for its {width} components"
    ours += RIDGE * ours.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    outer.weight[: len(head.weight)] = (head.weight.double().cpu() @ torch.linalg.solve(ours, both.T).T).to(
        outer.weight
    )
    return f"by least squares, over {count:,} positions"


def _copy_norm(model: Any, teacher: Any) -> str:
    """The module after the layers that has the same name in both."""
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        ours, theirs = (getattr(m.base_model, name, None) for m in (model, teacher))
        if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module) and type(ours) is type(theirs):
            own, other = ours.state_dict(), theirs.state_dict()
            if {n: x.shape for n, x in own.items()} == {n: x.shape for n, x in other.items()}:
                ours.load_state_dict(other)
                return "copied"
    return _LEFT


def _plain(model: Any, head: Any) -> bool:
    """Whether logits are the product of states and head."""
    values = [getattr(model.config, name, None) for name in (*MULTIPLIERS, *SOFTCAPS)]
    return head.bias is None and all(value in (None, 1, 1.0, False) for value in values)


def _of(model: Any, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _once(notes: list[str], text: str) -> None:
    """Add a note, unless there is one for another layer with the same reason."""
    reason = text.partition(": ")[2]
    if not any(note.endswith(reason) for note in notes):
        notes.append(text)
