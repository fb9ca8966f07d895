"""Capture against the bare teacher: the same batches through the model and its LM head, keeping nothing.

    python bench/bench_capture.py [--device cuda] [--rounds N] [--features 10,20,-1] [--workers] [--json PATH]

On a CPU with SmolLM2-135M (see teacher.py) over real text; on a GPU with teachers of random weights, 1B-class and 135M.
Capture includes everything: planning, reading, running, top-k with four tails and draws, encoding, writing, sealing.
--features: also capture with hidden states, three layers by default (CPU; "": none). Their bases are there already:
they are learnt once for a cache, from 16,384 positions.
--workers: two processes of one core each against one (CPU).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import fastkd
from fastkd.bench.harness import peak_bytes
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.cache import create_cache, open_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture.answers import topk_config
from fastkd.capture.prepare import prepare
from fastkd.capture.rows import read_shard_rows, teacher_inputs
from fastkd.capture.teacher_pass import TeacherPass, _Shard
from fastkd.data.documents import Documents, open_documents
from fastkd.kernels import linear_topk_targets
from fastkd.kernels.lm_head import LMHead
from fastkd.kernels.topk.api import default_chunk
from fastkd.models.protocol import Hidden
from fastkd.settings import CaptureSettings

FEATURES = ("10", "20", "-1")


class Decoder:
    """A decoder of transformers as a teacher."""

    max_positions = None

    def __init__(self, model: Any, fingerprint: str) -> None:
        self.model, self.fingerprint = model.eval().requires_grad_(False), fingerprint
        self.head = LMHead(model.get_output_embeddings().weight)
        self.vocab_size = len(self.head.weight)
        self.device = self.head.weight.device

    def __call__(self, inputs: Tensor) -> Hidden:
        return Hidden(self.model.base_model(inputs, use_cache=False).last_hidden_state, self.head)


def buffer_for(teacher: Decoder) -> Tensor:
    """A buffer for a chunk of logits, of the size that `linear_topk_targets` uses."""
    weight = teacher.head.weight
    return torch.empty(
        (default_chunk(weight, teacher.vocab_size), teacher.vocab_size), dtype=weight.dtype, device=weight.device
    )


def project(teacher: Decoder, states: Tensor, buffer: Tensor) -> None:
    """The product with the LM head, chunk by chunk into the same buffer."""
    for some in states.split(len(buffer)):
        torch.mm(some, teacher.head.weight.T, out=buffer[: len(some)])


@torch.inference_mode()
def bare(teacher: Decoder, batches: list[Tensor], buffer: Tensor) -> None:
    """The model and its LM head on every batch."""
    for inputs in batches:
        project(teacher, teacher(inputs.to(teacher.device, non_blocking=True)).states.flatten(0, 1), buffer)


def prepared(teacher: Decoder, data: Documents, settings: CaptureSettings) -> Callable[[], MemoryStore]:
    """A function that returns an empty store, but for what is found once for the features of a cache."""
    whole = MemoryStore()
    fastkd.capture(teacher, data, whole, settings)
    names = ("basis.zarr.zip", "spec.json")
    kept = {e.key: whole.get(e.key) for e in whole.list("") if e.key.rpartition("/")[2] in names}

    def make() -> MemoryStore:
        store = MemoryStore()
        for key, data in kept.items():
            store.create(key, data)
        return store

    return make


def bench(
    table: Table,
    teacher: Decoder,
    data: Documents,
    settings: CaptureSettings,
    limit: float,
    rounds: int,
    features: tuple[str, ...] = (),
) -> None:
    """One teacher's rows."""
    device = teacher.device.type
    plan, _ = prepare(teacher, data, settings)
    batches = [
        teacher_inputs(read_shard_rows(plan, data, i), data, p) for i in range(plan.shards) for p in plan.batches(i)
    ]
    positions, buffer = plan.totals["positions"], buffer_for(teacher)
    table.title(
        f"{teacher.fingerprint}: {positions:,} positions, {len(batches)} batches of {tuple(batches[0].shape)}, "
        f"{plan.shards} shards; k={settings.k} draws={settings.draws} T={settings.temperatures}"
    )
    one = device == "cpu" and torch.get_num_threads() == 1
    runs: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(teacher, batches, buffer),
        "capture": lambda: fastkd.capture(teacher, data, MemoryStore(), settings),
    }
    if features:
        more = replace(settings, features=features)
        empty = prepared(teacher, data, more)
        runs["with features"] = lambda: fastkd.capture(teacher, data, empty(), more)
    ms = interleaved(
        runs,
        device=device,
        rounds=rounds,
        warmup=1,
        core_time=one,
    )
    if one:
        print("  one thread: core time, which other processes do not affect")
    for name in runs:
        table.value(name, ms.time(name).inverse(positions * 1e3), "positions/s")
    spread = sorted(a / b for a, b in zip(ms.rounds["capture"], ms.rounds["bare"], strict=True))
    note = f"{rounds} rounds of {spread[0]:.3f} to {spread[-1]:.3f}"
    table.ratio("capture", ms.ratio("capture", "bare"), "the bare teacher", f"<= {limit}", note=note)
    if features:
        what = f"capture with {len(features)} layers"
        table.ratio(what, ms.ratio("with features", "bare"), "the bare teacher", "<= 1.10", note=", ".join(features))
    parts(table, teacher, data, settings, ms["bare"] / positions * 1e3)
    if device == "cuda":
        alone = peak_bytes(lambda: bare(teacher, batches, buffer) or [], "cuda") + buffer.nbytes
        del buffer

        def capture() -> list[Tensor]:
            fastkd.capture(teacher, data, MemoryStore(), settings)
            return []

        ours = peak_bytes(capture, "cuda")
        table.ratio("capture: peak device memory, weights apart", ours / alone, "the bare teacher's", "<= 1.1")


@torch.inference_mode()
def parts(table: Table, teacher: Decoder, data: Documents, settings: CaptureSettings, bare_us: float) -> None:
    """The parts of the overhead, timed alone: microseconds per position, and as a share of the teacher's time."""
    device, (plan, spec) = teacher.device.type, prepare(teacher, data, settings)
    some = read_shard_rows(plan, data, 0)
    places = plan.batches(0)[0]
    inputs = teacher_inputs(some, data, places).to(teacher.device)
    states, buffer = teacher(inputs).states.flatten(0, 1), buffer_for(teacher)
    config = topk_config(settings)

    def targets(draws: int) -> Callable[[], object]:
        return lambda: linear_topk_targets(states, teacher.head, config=config, draws=draws)

    teacher_pass, source = TeacherPass(teacher, settings), _Shard(some, data, 0)
    arrays, _ = teacher_pass.run(some, plan.batches(0), data, 0)
    pending = teacher_pass._submit(source, places)

    def write() -> None:
        with create_cache(MemoryStore(), spec) as writer:
            writer.write_shard(
                0,
                some.inputs,
                **cast(dict[str, Any], arrays),
                sequence_lengths=some.sequence_lengths,
                document_lengths=some.document_lengths,
            )

    ms = interleaved(
        {
            "head": lambda: project(teacher, states, buffer),
            "targets": targets(0),
            "with draws": targets(settings.draws),
        },
        device=device,
        rounds=7,
        warmup=2,
        core_time=device == "cpu" and torch.get_num_threads() == 1,
    )
    host = interleaved(
        {
            "read": lambda: [teacher_inputs(read_shard_rows(plan, data, 0), data, p) for p in plan.batches(0)],
            "collect": lambda: teacher_pass._collect(pending, arrays, source),
            "write": write,
        },
        device="cpu",
        rounds=7,
        warmup=2,
        core_time=torch.get_num_threads() == 1,
    )
    batch, shard = len(states), len(some)
    figures = {
        "head of the distribution and tails": (ms["targets"] - ms["head"]) / batch,
        "draws": (ms["with draws"] - ms["targets"]) / batch if settings.draws else 0.0,
        "reading rows and making batches": host["read"] / shard,
        "putting targets in their rows": host["collect"] / max(1, len(pending.rows)),
        "encoding and committing, on a thread beside": host["write"] / shard,
    }
    table.value("the teacher, a position", bare_us, "us")
    for name, value in figures.items():
        table.value(f"{name}, a position", value * 1e3, "us", note=f"{value * 1e3 / bare_us:.2%} of the teacher")


WORKER = """
import sys, json, torch
torch.set_num_threads(int(sys.argv[4]))
from fastkd.bench.bench_capture import smollm2, settings_cpu
import fastkd
teacher, data = smollm2(int(sys.argv[5]))
print("ready", flush=True)
sys.stdin.readline()
fastkd.capture(teacher, data, sys.argv[1], settings_cpu(), rank=int(sys.argv[2]), world_size=int(sys.argv[3]))
"""


def bench_workers(table: Table, positions: int) -> None:
    """One process of one core against two: the caches are equal; the ratio of their times."""
    table.title(f"processes of one core each, {positions:,} positions")
    seconds, found = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            place = str(Path(folder) / str(count))
            started = [
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        WORKER,
                        place,
                        str(r),
                        str(count),
                        "1",
                        str(positions),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for r in range(count)
            ]
            for process in started:
                assert process.stdout is not None
                process.stdout.readline()
            begun = time.perf_counter()
            for process in started:  # start all before waiting for one
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in started:
                process.communicate()
            seconds[count] = time.perf_counter() - begun
            if any(process.returncode for process in started):
                sys.exit("a worker failed")
            found[count] = open_cache(place).manifest.column("content_sha256").to_pylist()
    table.ratio("two processes: speed", seconds[1] / seconds[2], "one process", better="higher")
    differ = sum(a != b for a, b in zip(found[1], found[2], strict=True))
    table.value("shards that differ", differ, "shards", "<= 0", better="lower")


def settings_cpu() -> CaptureSettings:
    """The settings of the CPU's table."""
    return CaptureSettings(context=512, held_out=0.0, shard_positions=4096, batch_tokens=2048)


def smollm2(positions: int) -> tuple[Decoder, Documents]:
    """The real teacher, and a number of positions of real text in documents of 512."""
    from fastkd.bench.teacher import load_teacher, text_ids

    model, tokenizer = load_teacher(None)
    ids = text_ids(tokenizer)[:positions].numpy().astype(np.int32)
    return Decoder(model, "SmolLM2-135M"), open_documents([ids[i : i + 512] for i in range(0, len(ids), 512)])


def random_teacher(name: str) -> tuple[Decoder, Documents]:
    """A Llama with random weights on the GPU, and random ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, dict[str, int]] = {
        "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    }
    heads, vocab = {"1B": 8, "135M": 3}[name], {"1B": 128_256, "135M": 49_152}[name]
    config = LlamaConfig(
        **sizes[name],
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = np.random.default_rng(0).integers(0, vocab, (256, 2048), np.int32)
    return Decoder(model, f"{name}-class Llama, random weights, bfloat16"), open_documents(list(ids))


def on_cpu(table: Table, positions: int, rounds: int, features: tuple[str, ...] = FEATURES) -> None:
    """SmolLM2-135M over real text."""
    teacher, data = smollm2(positions)
    bench(table, teacher, data, settings_cpu(), 1.08, rounds, features)


def on_cuda(table: Table, name: str, limit: float, rounds: int) -> None:
    """A teacher with random weights."""
    teacher, data = random_teacher(name)
    settings = CaptureSettings(context=2048, held_out=0.0, shard_positions=2**17, batch_tokens=8192)
    bench(table, teacher, data, settings, limit, rounds)


def sections(
    device: str, positions: int, rounds: int, *, workers: bool = False, features: tuple[str, ...] = FEATURES
) -> list[Case]:
    """A case for each teacher. workers: also two processes against one (CPU)."""
    if device == "cuda":
        return [
            Case(f"{name}-class teacher", partial(on_cuda, name=name, limit=limit, rounds=rounds))
            for name, limit in (("1B", 1.05), ("135M", 1.10))
        ]
    found = [Case("SmolLM2-135M", partial(on_cpu, positions=positions, rounds=rounds, features=features))]
    if workers:
        found.append(Case("two processes", partial(bench_workers, positions=positions)))
    return found


def cases(ask: RunConfig) -> Sequence[Case]:
    """On a CPU: 2,048 positions; full: 8,192 positions, and two processes against one."""
    return sections(ask.device, ask.size(2048, 8192), ask.times(3, 5), workers=ask.full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=8192, help="positions of the CPU's table")
    parser.add_argument(
        "--threads", type=int, help="threads of the teacher (CPU); 1: compare core time, for a busy machine"
    )
    parser.add_argument("--features", default=",".join(FEATURES), help="layers whose states are captured too (CPU)")
    parser.add_argument("--workers", action="store_true", help="also two processes against one (CPU)")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table(args.device, "capture")
    features = tuple(name for name in args.features.split(",") if name)
    found = sections(args.device, args.positions, args.rounds, workers=args.workers, features=features)
    run_cases(found, table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
