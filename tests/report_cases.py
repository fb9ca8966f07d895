"""Synthetic run folders, with realistic values."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.evaluate.api import Evaluation
from fastkd.evaluate.result import BINS, Windows
from fastkd.evaluate.slices import SLICES

# held-out: cross-entropy, kl_bucket, kl_sampled, agreement, accuracy; overconfidence
STUDENT = (3.016, 0.6475, 0.71, 0.603, 0.42, 0.02)
NAMES = ("cross_entropy", "kl_bucket", "kl_sampled", "agreement", "accuracy")
CONTROL = (3.043, 0.7603, 0.83, 0.574, 0.415, 0.05)
FROM = dict(zip(NAMES, CONTROL, strict=False))


def evaluation(
    figures: tuple[float, ...] = STUDENT, *, windows: int = 12, seed: int = 0, content: str = "c0"
) -> Evaluation:
    """An evaluation with about these values. The differences between windows are the same for all of them."""
    counts = np.full(windows, 511.0)
    hard = np.random.default_rng(99).normal(0, 1, windows)
    own = np.random.default_rng([seed, *(int(1e4 * f) for f in figures)])
    spread = {"cross_entropy": 0.35, "kl_bucket": 0.06, "kl_sampled": 0.07, "agreement": -0.04, "accuracy": -0.05}
    sums = {
        name: counts * (value + spread[name] * hard + 0.08 * abs(spread[name]) * own.normal(size=windows))
        for name, value in zip(NAMES, figures, strict=False)
    }
    of_teacher = {
        "label_known": 0.93, "cross_entropy_at_least": 2.44, "tail_mass": 0.081, "accuracy": 0.487,
        "entropy_at_least": 2.02, "entropy_at_most": 2.83, "entropy_sampled": 2.41,
    }  # fmt: skip
    teachers = {name: counts * (value * (1 + 0.04 * hard)) for name, value in of_teacher.items()}
    return Evaluation(
        split="held_out",
        spec="5" * 64,
        content=content,
        student=Windows(counts, sums, _bins(counts, figures[4], figures[5])),
        teacher=Windows(counts, teachers, _bins(counts, 0.487, 0.012)),
        slices=_slices(counts, sums),
        positions=int(counts.sum()) + windows,
        seconds=9.1,
        timed_positions=int(counts.sum()),
        device="CPU, 2 threads",
    )


def _slices(counts: Any, sums: dict[str, Any]) -> dict[str, Windows]:
    """What distillation did lies where the teacher is right; where it is wrong, it is the other way round."""
    found = {}
    for name, share in zip(SLICES, (0.49, 0.51, 0.3, 0.4, 0.3, 0.35, 0.3, 0.35), strict=True):
        middle = {key: row.sum() / counts.sum() for key, row in sums.items()}
        turn = -1.0 if name == "teacher/wrong" else 1.0
        own = {key: share * (row + (turn - 1.0) * (middle[key] - FROM[key]) * counts) for key, row in sums.items()}
        found[name] = Windows(share * counts, own)
    return found


def _bins(counts: Any, accuracy: float, gap: float) -> Any:
    centre = (np.arange(BINS) + 0.5) / BINS
    weight = np.exp(-((centre - accuracy) ** 2) / 0.12)
    weight /= weight.sum()
    positions = counts[:, None] * weight
    noise = 0.03 * np.random.default_rng(5).normal(size=positions.shape)
    right = np.clip(centre - gap * 4 * centre * (1 - centre) * 2 + noise, 0, 1)
    return np.stack([positions, positions * centre, positions * right], 2)


def write_run(
    folder: Path,
    figures: tuple[float, ...] = STUDENT,
    *,
    control: tuple[float, ...] | None = CONTROL,
    without: tuple[float, ...] | None = None,
    steps: int = 240,
    seed: int = 0,
    place: str = "",
    spec: str = "",
    evaluated: bool = True,
    notes: str = "",
    **settings: Any,
) -> Path:
    """A run's folder, its control's within it, and if asked the one without features."""
    folder.mkdir(parents=True)
    found = evaluation(figures, seed=seed)
    alpha = settings.get("alpha", 0.5)
    command = ["fastkd", "train", "--cache", place or "cache", "--student", "SmolLM2-135M", "--out", str(folder.name)]
    chosen = {
        "rate": 3e-4, "alpha": 0.5, "temperature": 1.0, "divergence": "forward_kl", "treatment": "auto", "seed": 0,
        "batch_tokens": 1024, "optimizer": {"betas": [0.9, 0.95], "weight_decay": 0.1}, "schedule": "cosine",
    }  # fmt: skip
    noted = [notes] if notes else []
    document: dict[str, Any] = {
        "format": "fastkd-run",
        "version": 1,
        "settings": chosen | settings,
        "student": {"name": "SmolLM2, cut", "parameters": 113_240_000, "bytes": 452_960_000, "notes": noted},
        "teacher": {"parameters": 134_515_008, "bytes": 538_060_032},
        "caches": [{"place": place, "spec": spec or found.spec}] if place else [],
        "machine": {"fastkd": "0.1.0", "torch": "2.13.0", "machine": "x86_64", "threads": 2, "processes": 1},
        "command": command,
        "report": {"evaluation": {name: value.mean for name, value in found.intervals().items()}},
    }
    (folder / "run.json").write_text(json.dumps(document))
    random = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        fall = math.exp(-step / 60)
        hard = 2.95 + 1.6 * fall + 0.12 * random.normal()
        soft = figures[1] + 1.4 * fall + 0.05 * random.normal()
        rate = 3e-4 * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        lines.append(
            {
                "step": step,
                "epoch": 0,
                "loss": alpha * hard + (1 - alpha) * soft,
                "hard": hard,
                "soft": soft,
                "rate": rate,
                "alpha": alpha,
                "temperature": 1.0,
                "grad_norm": 0.8 + 2 * fall + 0.1 * random.random(),
                "positions": 1022,
                "positions_per_second": 1430 + 40 * random.normal(),
                "waiting": 0.002 + 0.001 * random.random(),
                "seconds": 0.714,
            }
        )
        if step % 40 == 0:
            on_the_way = tuple(f + (0.9 * fall if i < 3 else -0.2 * fall) for i, f in enumerate(figures[:5]))
            lines.append({"step": step, "evaluation": evaluation((*on_the_way, figures[5])).summary()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(found.to_json()))
    same: dict[str, Any] = {"control": None, "steps": steps, "place": place, "spec": spec, "evaluated": evaluated}
    if control is not None:
        write_run(folder / "control", control, seed=seed + 1, **same, **(settings | {"alpha": 1.0}))
    if without is not None:
        write_run(folder / "without_features", without, seed=seed + 2, **same, **(settings | {"match": []}))
    return folder
