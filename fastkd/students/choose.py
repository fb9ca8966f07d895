"""The choice of a pruned copy: shapes that fit a budget, filled with what matters most, and compared untrained.

1. One forward pass of the teacher over a sample of the cache's training split measures its parts (`importance.py`).
2. Layers are ordered by the KL divergence without them (`depth.py`), on a quarter of the sample.
3. Some shapes between depth and width that fit (`shapes.py`) are made, and their KL divergence from the teacher's
   cached answers is measured: of all on the quarter, of the best third on the whole sample. The lowest is chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..cache import Cache
from ..errors import TrainError
from ..models.axes import ModelAxes, Shape
from ..models.prune import Kept, prune
from ..models.taps import layers_of
from ..stream.batch import MicroBatch
from ..train.student import Student, of_transformers
from ..utils.progress import Mode, Progress
from .depth import Skipping, removal_order
from .importance import Importance, Tally
from .result import Candidate
from .sample import Sample, kl_on

_PART = 4  # the order of layers and the first round are measured on one part in so many of the sample
_SECOND = 3  # one candidate in so many, and at least two, is in the second round
_SAME = 0.1  # nats by which a teacher may differ from its own cached answers: codec, precision


@dataclass(frozen=True)
class Choice:
    """kept: what stays of the teacher. order, kl_after: see `StudentReport`. candidates: the best first."""

    kept: Kept
    order: list[int]
    kl_after: list[float]
    candidates: list[Candidate]


def logits_of(student: Student) -> Callable[[MicroBatch], Tensor]:
    """The function of `kl_on` for a student, in evaluation mode."""
    student.eval()
    return lambda batch: student.logits(batch, rows=batch.targets.index)


def teacher_on(teacher: Student, cache: Cache, sample: Sample, mode: Mode, tally: Tally | None = None) -> float:
    """The KL divergence of the teacher itself from its cached answers. tally: records the pass.

    Raises TrainError if it is not the cache's teacher.
    """
    run = logits_of(teacher)
    with Progress(sample.counted, unit="position", what="teacher", mode=mode) as bar:
        bar.event("note", text="the teacher, on a sample of the cache")
        found = kl_on(sample, run if tally is None else tally.of(run), bar.add)
    if not found <= _SAME:
        raise TrainError(
            f"cache: got {cache!r}, from whose targets {teacher.name} has a KL divergence of {found:.2f} nats; "
            f"expected its own answers (at most {_SAME:g}). Capture this teacher, or name the cache's."
        )
    return found


def choose(
    teacher: Student, axes: ModelAxes, importance: Importance, shapes: list[Shape], sample: Sample, mode: Mode
) -> Choice:
    """The best of some shapes, and what of the teacher it consists of."""
    model: Any = teacher.model
    part = sample.first(-(-sample.positions // _PART))
    most = axes.shape.layers - min(shape.layers for shape in shapes)
    order, after = _order(teacher, most, part, mode) if most else ([], [])

    def kept_of(shape: Shape) -> Kept:
        gone = set(order[: axes.shape.layers - shape.layers])
        layers = tuple(n for n in range(axes.shape.layers) if n not in gone)
        return importance.kept(axes, layers, shape)

    def measured(shapes: list[Shape], on: Sample) -> list[Candidate]:
        found = []
        for shape in shapes:
            student = of_transformers(prune(model, axes, kept_of(shape)), teacher.name)
            kl = kl_on(on, logits_of(student), bar.add)
            found.append(Candidate(shape, axes.parameters(shape), kl, on.counted))
        return sorted(found, key=lambda one: (one.kl, -one.size))

    second = min(len(shapes), max(2, -(-len(shapes) // _SECOND))) if len(part.batches) < len(sample.batches) else 0
    total = len(shapes) * part.counted + second * sample.counted
    with Progress(total, unit="position", what="candidates", mode=mode) as bar:
        bar.event("note", text=f"{len(shapes)} candidates")
        first = measured(shapes, part)
        candidates = measured([one.shape for one in first[:second]], sample) + first[second:]
    return Choice(kept_of(candidates[0].shape), order, after, candidates)


def _order(teacher: Student, most: int, sample: Sample, mode: Mode) -> tuple[list[int], list[float]]:
    count = len(layers_of(teacher.model))
    # each layer once, and a few again for each that is removed
    with Progress((count + 3 * most) * sample.counted, unit="position", what="layers", mode=mode) as bar:
        bar.event("note", text=f"the order in which up to {most} layers are removed")
        return removal_order(count, most, Skipping(teacher.model, sample, logits_of(teacher), bar.add))
