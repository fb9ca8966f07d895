"""Two small problems for trainings without a cache: handwritten digits with few labels, and few bytes of English text.

What is held out is known to no student.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fastkd.bench.features_problem import COPIES, LENGTH, ByteModel, documents_of, made
from fastkd.demo.corpus import language_reference
from fastkd.demo.digits_inputs import CLASSES, HELD_OUT, digits, new_net
from fastkd.settings import LiveSettings

STEPS = 200


@dataclass(frozen=True, eq=False)
class LiveProblem:
    """Data for `fastkd.train(..., data=...)`, and students for them.

    student: makes a new one by a seed. live: how data are divided. changes: settings of a training. says: in words.
    """

    data: Any
    live: LiveSettings
    student: Callable[[int], nn.Module]
    says: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def few_digits(images: int = 50, *, width: int = 8, seed: int = 0) -> LiveProblem:
    """The first digits, with labels, in 8 augmented copies; a fifth of all 1797 is held out."""
    live = LiveSettings(k=CLASSES, draws=0, held_out=HELD_OUT, data_seed=seed, shard_positions=1024)
    changes = {"rate": 2e-2, "weight_decay": 0.01, "batch_size": 32, "max_positions": images * COPIES, "steps": STEPS}
    says = f"{images} digits, a network of width {width}"
    return LiveProblem(digits(seed, images=1797, copies=COPIES), live, partial(new_net, width), says, changes)


def few_bytes(documents: int = 512, *, width: int = 24, layers: int = 2, seed: int = 0) -> LiveProblem:
    """The first documents, of 64 bytes each, of CPython's language reference; a tenth of all of it is held out."""
    found, vocabulary = documents_of(next(language_reference()))
    live = LiveSettings(
        k=32, draws=8, context=LENGTH, packing="keep", held_out=0.1, data_seed=seed, shard_positions=2**15
    )
    changes = {
        "rate": 5e-3,
        "weight_decay": 0.05,
        "batch_size": 16,
        "max_positions": documents * LENGTH,
        "steps": STEPS,
    }
    says = f"{documents} documents of {LENGTH} bytes, a transformer of width {width} and {layers} layers"
    student = partial(_byte_model, vocabulary, width, layers)
    return LiveProblem(found.tolist(), live, student, says, changes)


def _byte_model(vocabulary: int, width: int, layers: int, seed: int) -> nn.Module:
    return made(ByteModel, vocabulary, width, layers, 2, seed=seed)
