"""Whether born-again generations help: students of the teacher's own size, in settings with little data.

    python bench/generations_help.py [digits] [bytes]     # some minutes on two cores

Each seed is another split, teacher and students. A difference is of the same seed, ± its 95% interval over seeds; the
ensemble's student learns from the mean of the caches of the teacher and of generation 1.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fastkd
from fastkd.bench.features_problem import LENGTH, ByteModel, documents_of, made, train_byte_teacher
from fastkd.bench.timing import interval
from fastkd.data.packing import held_out_documents
from fastkd.demo.corpus import language_reference
from fastkd.demo.digits_inputs import Net, digits, new_net
from fastkd.settings import LiveSettings

HELD_OUT = 0.8
MEASURES = ("cross_entropy", "accuracy", "ece")
WIDTH, COPIES = 8, 4
BYTES = (24, 2, 2)  # width, layers, heads


def digits_case(seed: int) -> tuple[Any, Any, Any, LiveSettings, dict[str, Any]]:
    """Student, teacher, data and settings: a fifth of the digits, a teacher of the student's size, on their labels."""
    data = digits(seed, images=1797, copies=COPIES)
    numbers = np.flatnonzero(~held_out_documents(np.arange(len(data), dtype=np.int32), HELD_OUT, seed))
    model, random = new_net(WIDTH, 100 + seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=400)
    for _ in range(400):
        batch = random.choice(numbers, 64)
        images = data.read(batch, random.integers(0, 2**63, len(batch)))
        loss = F.cross_entropy(model(images), torch.from_numpy(data.labels(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    live = LiveSettings(k=10, draws=0, held_out=HELD_OUT, data_seed=seed, shard_positions=2048)
    changes = {"alpha": 0.1, "temperature": 2.0, "rate": 2e-2, "weight_decay": 0.01, "batch_size": 32, "steps": 300}
    return partial(Net, WIDTH), model.eval(), data, live, changes


def bytes_case(seed: int) -> tuple[Any, Any, Any, LiveSettings, dict[str, Any]]:
    """The same of text: a fifth of 1,024 documents of 64 bytes, and a teacher of the student's size on them."""
    found, vocabulary = documents_of(next(language_reference()), 1024)
    held = held_out_documents(np.arange(len(found), dtype=np.int32), HELD_OUT, seed)
    teacher = made(ByteModel, vocabulary, *BYTES, seed=100 + seed)
    assert isinstance(teacher, ByteModel)
    train_byte_teacher(teacher, found[~held], steps=300, seed=seed)
    live = LiveSettings(
        k=32, draws=8, context=LENGTH, packing="keep", held_out=HELD_OUT, data_seed=seed, shard_positions=2**14
    )
    changes = {"alpha": 0.1, "rate": 3e-3, "weight_decay": 0.05, "batch_size": 16, "steps": 300}
    return partial(ByteModel, vocabulary, *BYTES), teacher, found.tolist(), live, changes


CASES: dict[str, Callable[[int], tuple[Any, Any, Any, LiveSettings, dict[str, Any]]]] = {
    "digits": digits_case,
    "bytes": bytes_case,
}


def scores(case: str, seed: int) -> dict[str, dict[str, float]]:
    """The held-out measures of each student."""
    student, teacher, data, live, changes = CASES[case](seed)
    with tempfile.TemporaryDirectory() as folder:
        report = fastkd.generations(
            2, student, teacher, data, Path(folder) / "out", live=live, control=True, seed=1000 * (1 + seed),
            evaluate_every=changes["steps"], device="cpu", **changes,
        )  # fmt: skip
    return {m.name: {name: m.values[name].mean for name in MEASURES} for m in report.members}


def text_of(case: str, found: Sequence[dict[str, dict[str, float]]]) -> str:
    lines = [f"{case}, {len(found)} seeds"]
    for name in MEASURES:
        means = {arm: np.mean([one[arm][name] for one in found]) for arm in found[0]}
        lines.append(f"  {name}: " + ", ".join(f"{arm} {value:.4f}" for arm, value in means.items()))
        for ours, theirs in (
            ("generation 1", "control"), ("generation 2", "control"), ("generation 2", "generation 1"),
            ("ensemble", "generation 1"), ("ensemble", "generation 2"),
        ):  # fmt: skip
            mean, half = interval([one[ours][name] - one[theirs][name] for one in found])
            lines.append(f"    {ours} minus {theirs}: {mean:+.4f} ± {half:.4f}")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    for case in sys.argv[1:] or list(CASES):
        found = []
        for seed in range(3):
            found.append(scores(case, seed))
            print(f"{case}, seed {seed}: {found[-1]}", file=sys.stderr, flush=True)
        print(text_of(case, found), flush=True)


if __name__ == "__main__":
    main()
