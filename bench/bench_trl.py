"""DistillTrainer beside the trainers that people would use otherwise: transformers' Trainer on cross-entropy alone, and
TRL's GKD with a live teacher.

    python bench/bench_trl.py         # --sections trainer gkd quality; extras peers and hf; ten minutes of core time
    python bench/bench_trl.py --json bench/recorded/MACHINE-trl.json

All train the same student of 28M parameters (V = 49,152) in float32 on the same windows with the same batch size, AdamW
and schedule. `trainer`: a step over one of the Trainer with the model's own cross-entropy. `gkd`: a step of GKDTrainer
(lmbda=0, beta=0: no sampling, forward KL), whose teacher has 1, 4 and 10 times the student's parameters (4: those of
SmolLM2-135M; the others are random), over one from the teacher's cache; and the number of students from which capture
and trainings together are cheaper. `quality`: both students of SmolLM2-135M after the same steps on CPython's language
reference, on windows that neither saw.

On a CPU, core time of one thread: other processes on the machine do not count.
"""

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastkd
from fastkd.bench.bench_train import VOCAB, model_of
from fastkd.bench.harness import peak_bytes
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import figure
from fastkd.cache import open_cache
from fastkd.demo.corpus import language_reference
from fastkd.demo.smollm2 import convert, find_gguf
from fastkd.evaluate.api import evaluate
from fastkd.models.hub import load_transformers

STUDENT = (384, 6, 6, 3, 1024)
TEACHERS: dict[int, Any] = {1: STUDENT, 4: None, 10: (1024, 20, 16, 8, 2816)}
"""By the factor over the student's size; None: SmolLM2-135M."""
LENGTH, ROWS = 256, 2
MEASURED = 4  # steps of a round, after one that warms up


def arguments(out: Path, steps: int, **changes: Any) -> dict[str, Any]:
    """Arguments of all trainers."""
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(out), "per_device_train_batch_size": ROWS, "max_steps": steps, "learning_rate": 3e-4,
        "optim": "adamw_torch", "report_to": [], "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True,
        "use_cpu": on_cpu, "bf16": not on_cpu, "log_level": "error", "dataloader_pin_memory": not on_cpu,
    } | changes  # fmt: skip


class Steps:
    """A callback's record: milliseconds of each optimizer step, and the peak of the last one."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.times = trainer, list[float]()
        clock = time.process_time if trainer.args.device.type == "cpu" else time.perf_counter
        training_step = trainer.training_step
        callback: Any = load_transformers().TrainerCallback()
        begun = [0.0]

        def begin(*_: Any, **__: Any) -> None:
            begun[0] = clock()

        def end(*_: Any, **__: Any) -> None:
            if trainer.args.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append((clock() - begun[0]) * 1e3)

        callback.on_step_begin, callback.on_step_end = begin, end
        trainer.add_callback(callback)
        self._step: Callable[..., Any] = training_step

    def run(self) -> list[float]:
        """Train. Milliseconds of the steps but the first."""
        self.trainer.train()
        return self.times[1:]

    def peak(self) -> int:
        """Peak bytes of forward and backward of one more micro-batch, gradients included."""
        model, batch = self.trainer.model_wrapped, next(iter(self.trainer.get_train_dataloader()))
        return peak_bytes(lambda: [self.trainer.training_step(model, batch, 1)], self.trainer.args.device.type)


def windows_of(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, LENGTH).tolist() for _ in range(count)]


def teacher_of(factor: int, device: str) -> Any:
    """A teacher, in evaluation mode."""
    size = TEACHERS[factor]
    if size is None:
        with tempfile.TemporaryDirectory() as folder:
            convert(find_gguf(), place := Path(folder) / "teacher")
            found = load_transformers().AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(device)
    else:
        found = model_of(size, device)
    return found.eval().requires_grad_(False)


def capture(teacher: Any, windows: Sequence[Sequence[int]], folder: Path, **changes: Any) -> float:
    """The cache of a teacher. Milliseconds a position, without what is done once for a model."""
    given: dict[str, Any] = {
        "context": LENGTH,
        "packing": "keep",
        "held_out": 0,
        "batch_tokens": ROWS * LENGTH,
    } | changes
    clock = time.process_time if next(teacher.parameters()).device.type == "cpu" else time.perf_counter
    begun = clock()
    fastkd.capture(teacher, windows, folder, **given)
    return (clock() - begun) * 1e3 / sum(map(len, windows))


def distiller(
    cache: Path, out: Path, device: str, *, steps: int = 1 + MEASURED, loss: Any = None, **changes: Any
) -> Any:
    from fastkd.integrations.hf import DistillTrainer

    args = load_transformers().TrainingArguments(**arguments(out, steps, **changes))
    return DistillTrainer(model_of(STUDENT, device), args, cache=cache, **({"alpha": 0.5} if loss is None else loss))


def on_labels(windows: Sequence[Sequence[int]], out: Path, device: str) -> Any:
    """transformers' Trainer, whose loss is the model's own."""
    transformers = load_transformers()
    rows = [{"input_ids": torch.tensor(one), "labels": torch.tensor(one)} for one in windows]
    args = transformers.TrainingArguments(**arguments(out, 1 + MEASURED))
    return transformers.Trainer(model_of(STUDENT, device), args, train_dataset=rows)


def gkd(
    teacher: Any, windows: Sequence[Sequence[int]], out: Path, device: str, *, steps: int = 1 + MEASURED, **changes: Any
) -> Any:
    """TRL's GKDTrainer without sampling, with the forward KL divergence."""
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        given = arguments(
            out, steps, lmbda=0.0, beta=0.0, disable_dropout=True, activation_checkpointing=False, **changes
        )
        args = GKDConfig(**given)
    rows = Dataset.from_dict({"input_ids": windows, "labels": windows})

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = torch.tensor([one["input_ids"] for one in batch])
        return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens),
                "prompts": tokens[:, :1], "prompt_attention_mask": torch.ones_like(tokens[:, :1])}  # fmt: skip

    return GKDTrainer(
        model_of(STUDENT, device), teacher_model=teacher, args=args, data_collator=collate, train_dataset=rows,
        processing_class=_tokenizer(),
    )  # fmt: skip


def _tokenizer() -> Any:
    """A tokenizer that an SFTTrainer wants, and nothing reads."""
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return load_transformers().PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<pad>")


def trainer(table: Table, rounds: int) -> None:
    """A step of DistillTrainer over one of the Trainer on labels."""
    windows = windows_of(ROWS * (1 + MEASURED))
    times: dict[str, list[float]] = {"distil": [], "cross-entropy": []}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        capture(model_of((64, 1, 2, 1, 128), table.device).eval(), windows, place / "cache")
        for _ in range(rounds):
            for name in times:
                made = distiller(place / "cache", place / "run", table.device) if name == "distil" else on_labels(
                    windows, place / "run", table.device
                )  # fmt: skip
                steps = Steps(made)
                times[name] += steps.run()
                peaks[name] = peaks.get(name) or steps.peak()
                del made, steps
                gc.collect()
    table.title(f"a step of {ROWS * LENGTH} positions of a student of {_millions(STUDENT)}M, V = {VOCAB}")
    for name, values in times.items():
        table.value(name, figure(values), "ms")
        table.value(f"{name}, peak memory of forward and backward", peaks[name] / 1e6, "MB")
    pairs = zip(times["distil"], times["cross-entropy"], strict=True)
    table.ratio("distil", figure([a / b for a, b in pairs]), "the Trainer on cross-entropy alone", "<= 1.05")
    peak = peaks["distil"] / peaks["cross-entropy"]
    table.ratio("distil, peak memory", peak, "the Trainer on cross-entropy alone", "<= 1.05")


def beside(table: Table, factor: int) -> None:
    """A step of GKD over one of DistillTrainer, with a teacher of a size."""
    windows = windows_of(ROWS * (1 + MEASURED))
    with tempfile.TemporaryDirectory() as folder:
        place, teacher = Path(folder), teacher_of(factor, table.device)
        size = sum(p.numel() for p in teacher.parameters()) / 1e6
        once = capture(teacher, windows[:ROWS], place / "first")  # finds the LM head, warms up
        once = min(once, capture(teacher, windows, place / "cache"))
        theirs = Steps(gkd(teacher, windows, place / "gkd", table.device))
        their_times, their_peak = theirs.run(), theirs.peak()
        del theirs, teacher
        gc.collect()
        ours = Steps(distiller(place / "cache", place / "run", table.device, loss={"alpha": 0.0}))
        our_times, our_peak = ours.run(), ours.peak()
    a, b = figure(our_times).median, figure(their_times).median
    table.title(f"beside a teacher of {size:.0f}M, {factor} times the student")
    table.value("distil", figure(our_times), "ms")
    table.value("GKD", figure(their_times), "ms")
    table.ratio("GKD", figure([y / x for x, y in zip(our_times, their_times, strict=True)]), "distil")
    table.ratio("GKD, peak memory", their_peak / our_peak, "distil", note="without the teacher's weights")
    table.value("capture", once * ROWS * LENGTH, "ms", note="of as many positions as a step, once")
    students = once * ROWS * LENGTH / (b - a)
    table.value(
        "students from which the cache is cheaper", ceil(students) if b > a else float("inf"), "", note="one pass"
    )


def quality(table: Table, steps: int) -> None:
    """Both students after the same steps, on held-out windows."""
    rows = 1
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        convert(find_gguf(), home := place / "teacher")
        teacher = load_transformers().AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
        teacher = teacher.to(table.device).eval().requires_grad_(False)
        tokenizer = load_transformers().AutoTokenizer.from_pretrained(home)
        tokens = tokenizer(next(language_reference()), verbose=False)["input_ids"]
        windows = [tokens[i : i + LENGTH] for i in range(0, LENGTH * (rows * steps + 12), LENGTH)]
        capture(teacher, windows, place / "cache", held_out=12 / len(windows), shard_positions=2**14)
        cache = open_cache(place / "cache")
        found: dict[str, dict[str, float]] = {}
        size: dict[str, Any] = {"steps": steps, "per_device_train_batch_size": rows}
        ours = distiller(place / "cache", place / "run", table.device, loss={"alpha": 0.0}, **size)
        # the windows of the training split, in the order of the cache
        trained = [batch["input_ids"][0].tolist() for batch in ours.get_train_dataloader()]
        ours.train_dataset.close()
        before = ours.evaluate()
        ours.train()
        found["distil"] = ours.evaluate()
        theirs = gkd(teacher, trained, place / "gkd", table.device, train_sampling_strategy="sequential", **size)
        theirs.train()
        measured = evaluate(_student(theirs.model), cache).summary()
        found["GKD"] = {f"eval_{name}": float(one["mean"] or 0.0) for name, one in measured.items()}
    table.title(f"{steps} steps of {rows * LENGTH} positions, held out; teacher SmolLM2-135M")
    for name in ("cross_entropy", "kl_sampled"):
        table.value(f"{name}, before", before[f"eval_{name}"], "nats")
        for who, one in found.items():
            table.value(f"{name}, {who}", one[f"eval_{name}"], "nats")


def _student(model: Any) -> Any:
    from fastkd.train.student import of_transformers

    vars(model).pop("forward", None)  # what TRL put before it
    return of_transformers(model, "student")


def _millions(size: tuple[int, ...]) -> int:
    return round(sum(p.numel() for p in model_of(size, "cpu").parameters()) / 1e6)


def sections(rounds: int, steps: int, teachers: Sequence[int] = tuple(TEACHERS)) -> dict[str, list[Case]]:
    """The cases by name."""
    return {
        "trainer": [Case("a step", partial(trainer, rounds=rounds))],
        "gkd": [Case(f"a teacher of {n} times the size", partial(beside, factor=n)) for n in teachers],
        "quality": [Case("held-out measures", partial(quality, steps=steps))],
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """All sections; the sizes of a small run are those of the script."""
    return [case for some in sections(ask.times(2, 3), ask.size(32, 48)).values() for case in some]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["trainer", "gkd", "quality"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="of the quality section")
    parser.add_argument("--teachers", nargs="+", type=int, choices=TEACHERS, default=list(TEACHERS),
                        help="of the gkd section, by their size over the student's")  # fmt: skip
    parser.add_argument("--json", type=Path, help="where to write the figures, after each case; a file of "
                        "bench/recorded/ is part of the published record")  # fmt: skip
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    table = Table("cuda" if torch.cuda.is_available() else "cpu", "trl")
    found = sections(args.rounds, args.steps, args.teachers)
    chosen = [case for name in found if name in args.sections for case in found[name]]
    run_cases(chosen, table, to_stderr, keep=lambda _: table.save(args.json))


if __name__ == "__main__":
    main()
