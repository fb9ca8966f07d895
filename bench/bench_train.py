"""A distillation step against a cross-entropy step, and against one with a live teacher; and the share of time that a
training waits for data.

    python bench/bench_train.py       # --sections step memory live waiting, large; three minutes on two cores

A step is forward, backward, clipping and AdamW of one student on one batch. There are two cross-entropy steps, both in
chunks of the same size through the same LM head: the engine's own, without targets (`fused`), and one in plain PyTorch
(`plain`). With a live teacher (`live`), a step runs it on the same tokens, and computes the dense KL divergence of all
outcomes, in the same chunks. On a GPU: a 135M-class student, 16,384 positions per step, and a teacher of a billion
random parameters; smaller ones on a CPU.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import SparseTargets
from fastkd.bench.cases import known_targets
from fastkd.bench.harness import peak_bytes
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.demo.step_ratio import labels_only
from fastkd.kernels.loss.linear import default_chunk
from fastkd.models.hub import load_transformers
from fastkd.settings import TrainSettings
from fastkd.stream.batch import MicroBatch
from fastkd.train.metrics import read_metrics
from fastkd.train.optimizer import clip_, make_optimizer
from fastkd.train.student import Student, of_transformers

VOCAB = 49152
# hidden, layers, heads, key-value heads, inner
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"student": (288, 6, 6, 3, 768), "teacher": (576, 30, 9, 3, 1536), "rows": 4, "length": 256},
    "cuda": {"student": (576, 30, 9, 3, 1536), "teacher": (2048, 16, 32, 8, 8192), "rows": 16, "length": 1024},
}


def model_of(size: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with random weights and a tied LM head."""
    hidden, layers, heads, kv, inner = size
    transformers = load_transformers()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=inner, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(device, dtype)


def batch_of(rows: int, length: int, targets: SparseTargets, device: str) -> MicroBatch:
    """Rows of random tokens; all positions but the last of each row count."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (rows, length), generator=random).to(device)
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    index = (labels.flatten() >= 0).nonzero()[:, 0]
    compact = replace(targets[: len(index)], index=index)
    places = torch.arange(length, device=device).expand(rows, -1).contiguous()
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
    sequences = torch.arange(rows, device=device)
    return MicroBatch(
        input_ids=tokens, labels=labels, position_ids=places, cu_seqlens=bounds, sequences=sequences, targets=compact,
        max_seqlen=length, positions=rows * length, layout="padded",
    )  # fmt: skip


class Steps:
    """The steps that are compared. Their weights have the same shapes and different values."""

    def __init__(self, device: str, temperature: float, rows: int | None = None) -> None:
        size = SIZES[device] | ({"rows": rows} if rows else {})
        self.device, self.size = device, size
        self.student: Student = of_transformers(model_of(size["student"], device), "student")
        self.student.autocast = torch.bfloat16 if device == "cuda" else None
        self.optimizer = make_optimizer(self.student, TrainSettings(), torch.device(device))
        n = size["rows"] * size["length"]
        targets = known_targets(n, VOCAB, 48, 16, device)
        self.batch = batch_of(size["rows"], size["length"], targets, device)
        self.labels_only = batch_of(size["rows"], size["length"], labels_only(targets), device)
        self.temperature = torch.tensor(temperature, device=device)
        self.alpha, self.one = (torch.tensor(x, device=device) for x in (0.5, 1.0))

    def distil(self) -> list[Tensor]:
        """A step on cached targets of 48 top-k entries and 16 draws."""
        return self.distil_from(self.batch)

    def distil_from(self, batch: MicroBatch) -> list[Tensor]:
        """A step on a batch's targets."""
        return self._step(
            lambda: self.student(batch, alpha=self.alpha, temperature=self.temperature, num_items=batch.count)["loss"]
        )

    def fused(self) -> list[Tensor]:
        """A cross-entropy step by the same engine."""
        return self._step(
            lambda: self.student(self.labels_only, alpha=self.one, temperature=self.one, num_items=self.batch.count)[
                "loss"
            ]
        )

    def plain(self) -> list[Tensor]:
        """A cross-entropy step in plain PyTorch: chunks of rows, gradients in the forward."""
        return self._step(lambda: self._chunked(self.batch, None))

    def live(self) -> list[Tensor]:
        """A step with a live teacher on the same tokens, with all its outcomes."""
        return self._step(lambda: self._chunked(self.batch, self.teacher))

    @cached_property
    def teacher(self) -> Any:
        """The teacher, with random weights, in the dtype of inference."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return model_of(self.size["teacher"], self.device, dtype).eval().requires_grad_(False)

    def _step(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        loss().backward()
        norm = clip_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [norm]

    def _chunked(self, batch: MicroBatch, teacher: Any) -> Tensor:
        """Loss over the student's states that count, a chunk of logits at a time."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            model: Any = self.student.model
            states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            theirs = None
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
                theirs = theirs.flatten(0, 1)[batch.targets.index]
            rows, labels = states.flatten(0, 1)[batch.targets.index], batch.labels.flatten()[batch.targets.index]
            weight = model.get_output_embeddings().weight
            return Chunks.apply(rows, weight, labels, theirs, None if teacher is None else teacher.lm_head.weight)


class Chunks(torch.autograd.Function):
    """Mean cross-entropy of logits in chunks; with a teacher, half cross-entropy and half KL divergence from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, theirs: Any, their_weight: Any) -> Tensor:
        dtype = torch.bfloat16 if rows.is_cuda else rows.dtype
        chunk, n = default_chunk(rows.device, len(weight), dtype.itemsize), len(rows)
        head = weight.to(dtype)
        d_rows, d_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=rows.device)
        for at in (slice(i, i + chunk) for i in range(0, n, chunk)):
            x = rows[at].to(dtype)
            z = (x @ head.t()).float()
            log_p = F.log_softmax(z, -1)
            total += F.nll_loss(log_p, labels[at], reduction="sum") * (1.0 if theirs is None else 0.5)
            p = log_p.exp()
            gradient = p.clone() if theirs is not None else p
            gradient[torch.arange(len(x), device=x.device), labels[at]] -= 1.0
            if theirs is not None:
                log_q = F.log_softmax((theirs[at] @ their_weight.t()).float(), -1)
                q = log_q.exp()
                total += 0.5 * (q * (log_q - log_p)).sum()
                gradient = 0.5 * gradient + 0.5 * (p - q)
            gradient = (gradient / n).to(dtype)
            d_rows[at] = (gradient @ head).to(d_rows.dtype)
            d_weight += (gradient.t() @ x).float()
        ctx.save_for_backward(d_rows, d_weight.to(weight.dtype))
        return total / n

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        d_rows, d_weight = ctx.saved_tensors
        return d_rows * upstream, d_weight * upstream, None, None, None


def step(table: Table, rounds: int, temperatures: Sequence[float] = (1.0, 2.0)) -> None:
    """Time of a step."""
    for temperature in temperatures:
        steps = Steps(table.device, temperature)
        runs = {name: getattr(steps, name) for name in ("distil", "fused", "plain")}
        times = interleaved(runs, device=table.device, rounds=rounds)
        table.title(f"a step of {steps.batch.positions} positions, V = {VOCAB}, T = {temperature:g}")
        for name in times:
            table.value(name, times.time(name), "ms")
        for name in ("fused", "plain"):
            table.ratio("distil", times.ratio("distil", name), f"{name} cross-entropy", "<= 1.05")


def memory(table: Table, temperatures: Sequence[float] = (1.0, 2.0), rows: int | None = None) -> None:
    """Peak memory of a step beyond weights, optimizer state and batch. rows: of the batch, instead of the default."""
    for temperature in temperatures:
        steps = Steps(table.device, temperature, rows)
        steps.distil()  # creates the optimizer's state
        table.title(f"peak memory of a step of {steps.batch.positions} positions, T = {temperature:g}")
        peaks = {name: peak_bytes(getattr(steps, name), table.device) for name in ("distil", "fused", "plain")}
        for name, peak in peaks.items():
            table.value(name, peak / 1e6, "MB")
        for name in ("fused", "plain"):
            table.ratio("distil", peaks["distil"] / peaks[name], f"{name} cross-entropy", "<= 1.05")


def live(table: Table, rounds: int) -> None:
    """The cost of a teacher that runs in every step."""
    steps = Steps(table.device, 1.0)
    runs = {"distil": steps.distil, "live": steps.live}
    times = interleaved(runs, device=table.device, rounds=rounds, warmup=1)
    size = sum(p.numel() for p in steps.teacher.parameters()) / 1e6
    table.title(f"against a teacher of {size:.0f}M parameters at hand")
    for name in times:
        table.value(name, times.time(name), "ms")
    table.ratio("distil", times.ratio("distil", "live"), "the teacher at hand")


def waiting(table: Table) -> None:
    """Throughput and waiting of a training from a cache, without its first two steps."""
    device = table.device
    size = SIZES[device]
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCAB, int(n)) for n in random.integers(20, 512, 120)]
    teacher = model_of((64, 1, 2, 1, 128), device).eval()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        fastkd.capture(
            lambda tokens: teacher(input_ids=tokens, use_cache=False).logits, documents, place / "cache",
            vocab_size=VOCAB, fingerprint="random", context=512, held_out=0, shard_positions=4096, batch_tokens=2048,
        )  # fmt: skip
        positions = size["rows"] * size["length"]
        student = model_of(size["student"], device)
        fastkd.train(
            student, place / "cache", place / "run", steps=14, epochs=10, batch_tokens=positions, evaluate_every=0
        )
        lines = read_metrics(place / "run")[2:]
    seconds = sum(line["seconds"] for line in lines)
    table.title(f"a training, {positions} positions a step")
    table.value("positions a second", sum(line["positions"] for line in lines) / seconds, "a second")
    table.value("waiting", sum(x["waiting"] * x["seconds"] for x in lines) / seconds, "share of time", "<= 0.01")


def sections(rounds: int, temperatures: Sequence[float] = (1.0, 2.0)) -> dict[str, Case]:
    """The cases by name."""
    return {
        "step": Case("a step", partial(step, rounds=rounds, temperatures=temperatures)),
        "memory": Case("memory", partial(memory, temperatures=temperatures)),
        "large": Case("memory of a large step", partial(memory, temperatures=(2.0,), rows=64)),
        "live": Case("the teacher at hand", partial(live, rounds=max(2, rounds // 2))),
        "waiting": Case("waiting", waiting),
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """All sections."""
    found = sections(ask.times(3, 5), ask.size((1.0,), (1.0, 2.0)))
    return [case for name, case in found.items() if name != "large" or (ask.full and ask.device == "cpu")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["step", "memory", "live", "waiting"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cuda" if torch.cuda.is_available() else "cpu", "train")
    found = sections(args.rounds)
    run_cases([found[name] for name in found if name in args.sections], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
