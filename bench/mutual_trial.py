"""Whether students that learn from each other are better than each alone: digits, and bytes of English text.

python -m fastkd.bench.mutual_trial [--seeds 3] [--task digits] [--every 20]

Each seed is other weights, and another order; a difference is of the same seed, ± its 95% interval over seeds.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import fastkd
from fastkd.bench.features_problem import COPIES, LENGTH, ByteModel, documents_of, made
from fastkd.bench.timing import interval
from fastkd.demo.corpus import language_reference
from fastkd.demo.digits_inputs import CLASSES, HELD_OUT, digits, new_net

# settings: of all students, together and alone
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "rate": 1e-2, "weight_decay": 0.01, "batch_size": 32, "steps": 300, "max_positions": 200 * COPIES,
        "held_out": HELD_OUT, "shard_positions": 1024, "k": CLASSES, "alpha": 0.5, "temperature": 1.0,
    },
    "text": {
        "rate": 5e-3, "weight_decay": 0.05, "batch_size": 16, "steps": 300, "max_positions": 256 * LENGTH,
        "held_out": 0.1, "shard_positions": 2**14, "packing": "keep", "context": LENGTH, "k": 64, "alpha": 0.5,
    },
}  # fmt: skip


def problem(task: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """Data, and new students by name: two of different sizes."""
    if task == "digits":
        widths = {"narrow": 8, "wide": 16}
        return digits(0, images=1797, copies=COPIES), {
            name: partial(new_net, width, 1000 * seed + width) for name, width in widths.items()
        }
    documents, vocabulary = documents_of(next(language_reference()), 2048)
    sizes = {"small": (24, 2, 2), "large": (48, 2, 4)}
    return documents.tolist(), {
        name: partial(made, ByteModel, vocabulary, *size, seed=1000 * seed + size[0]) for name, size in sizes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    asked = parser.parse_args()
    settings = TASKS[asked.task] | {"every": asked.every, "draws": asked.draws}
    settings |= {} if asked.steps is None else {"steps": asked.steps}
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(asked.seeds):
        data, students = problem(asked.task, seed)
        with tempfile.TemporaryDirectory() as folder:
            report = fastkd.mutual(
                students, None, Path(folder) / "run", data=data, control=True, seed=seed, device="cpu",
                evaluate_every=settings["steps"], **settings,
            )  # fmt: skip
        for name, one in report.students.items():
            assert one.control is not None
            for measure in ("cross_entropy", "accuracy"):
                pair = (one.evaluation[measure], one.control.evaluation[measure])
                found.setdefault(f"{name} {measure}", []).append(pair)
        for measure in ("cross_entropy", "accuracy"):
            best = max if measure == "accuracy" else min
            alone = best(one.control.evaluation[measure] for one in report.students.values() if one.control)
            found.setdefault(f"ensemble {measure}", []).append((report.ensemble[measure], alone))
    for name, pairs in found.items():
        together, alone = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        mean, half = interval([a - b for a, b in pairs])
        print(f"{name:24} together {together:.4f}, alone {alone:.4f}, difference {mean:+.4f} ± {half:.4f}")


if __name__ == "__main__":
    main()
