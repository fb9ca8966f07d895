"""A problem on which a student's own errors compound: words of nested brackets, each of which depends on all before.

    python -m fastkd.bench.rollouts_problem

The teacher is the language itself: it knows the exact distribution after any prefix, and after an error continues from
what was said. A student of two narrow layers loses track of the stack. Where that leads is on no document; with
rollouts, the student learns there too. All arms begin with the same student, trained off-policy, and make equally many
further steps of equally many sequences. They are compared by what the student says by itself: the part of its words
that are valid, and its reverse KL from the teacher, estimated on words of its own.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastkd
from fastkd.live.generators import Sampling, find
from fastkd.live.sampling import keys_of
from fastkd.models.hub import load_transformers
from fastkd.settings import RolloutSettings, TrainSettings
from fastkd.train.metrics import read_metrics
from fastkd.train.student import make_student
from fastkd.utils.intervals import t_quantile

KINDS = 6  # of brackets
BEGIN, END = 0, 1
VOCAB = 2 + 2 * KINDS
OPEN, CLOSE = 2, 2 + KINDS
LONGEST = 40  # tokens, after which nothing is opened any more
SPACE = 64  # tokens of the longest word, and some
WRONG = 1e-4  # probability of each token that does not fit


class Brackets(nn.Module):
    """The language: from token ids `[B, L]` to the exact logits `[B, L, V]` of the next token.

    A word is opened and closed at random, and ends when everything is closed. A closing bracket of a wrong kind closes
    the last one all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        kinds = torch.arange(1, KINDS + 1).double().reciprocal()
        self.kinds = (kinds / kinds.sum()).numpy()  # some are rarer

    def next(self, stack: list[int], length: int) -> np.ndarray:
        """The distribution of the next token, `[V]`."""
        found = np.full(VOCAB, WRONG)
        opening = 0.55 if stack else 0.7
        if length >= LONGEST:
            opening = 0.0
        if opening:
            found[OPEN : OPEN + KINDS] += opening * self.kinds
        found[CLOSE + stack[-1] if stack else END] += 1 - opening
        return found / found.sum()

    def forward(self, tokens: Tensor) -> Tensor:
        rows = []
        for word in tokens.tolist():
            stack: list[int] = []
            for length, token in enumerate(word, 1):
                self._take(stack, token)
                rows.append(np.log(self.next(stack, length)))
        return torch.from_numpy(np.array(rows)).float().view(*tokens.shape, VOCAB)

    def words(self, count: int, seed: int) -> list[list[int]]:
        """Words of the language."""
        random, found = np.random.default_rng(seed), []
        for _ in range(count):
            word, stack = [BEGIN], list[int]()
            while word[-1] != END and len(word) < SPACE - 2:
                p = self.next(stack, len(word))
                p[p < 2 * WRONG] = 0
                word.append(int(random.choice(VOCAB, p=p / p.sum())))
                self._take(stack, word[-1])
            found.append(word)
        return found

    @staticmethod
    def _take(stack: list[int], token: int) -> None:
        if OPEN <= token < CLOSE:
            stack.append(token - OPEN)
        elif token >= CLOSE and stack:
            stack.pop()

    @staticmethod
    def valid(word: list[int]) -> bool:
        """Whether a word is closed as it was opened, and ends there."""
        stack: list[int] = []
        for token in word[1:-1]:
            if OPEN <= token < CLOSE:
                stack.append(token - OPEN)
            elif token < CLOSE or not stack or stack.pop() != token - CLOSE:
                return False
        return word[-1] == END and not stack


def student_config(width: int, layers: int) -> Any:
    return load_transformers().LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=SPACE, bos_token_id=BEGIN,
        eos_token_id=END,
    )  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a student says by itself. valid: part of the words. reverse_kl: of words, from the teacher, in nats. tokens:
    mean length."""

    valid: float
    reverse_kl: float
    tokens: float


def measure(folder: Path, teacher: Brackets, *, count: int, seed: int) -> Said:
    """Sample words from a trained student, and score them."""
    student = make_student(str(folder), None).student
    sampling = Sampling(SPACE - 2, 1.0, VOCAB, (END,))
    generator, words = find("auto", student), []
    for start in range(0, count, 128):
        some = min(128, count - start)
        keys = keys_of(count, 10**6 + seed)[start : start + some]
        words += [[BEGIN, *one.tolist()] for one in generator([np.array([BEGIN])] * some, keys, sampling)]
    longest = max(map(len, words))
    tokens = torch.tensor([word + [END] * (longest - len(word)) for word in words])
    mask = torch.arange(1, longest) < torch.tensor([len(word) for word in words])[:, None]
    with student.sampling() as logits_of:
        logits = logits_of(tokens[:, :-1], torch.arange(count * (longest - 1))).view(count, longest - 1, VOCAB)
    ratio = torch.log_softmax(logits, -1) - torch.log_softmax(teacher(tokens[:, :-1]), -1)
    per_word = (ratio.gather(-1, tokens[:, 1:, None])[..., 0] * mask).sum(1)
    valid = mean(float(teacher.valid(word)) for word in words)
    return Said(valid, float(per_word.mean()), mean(len(word) - 1 for word in words))


ARMS: dict[str, tuple[str, float]] = {
    "forward KL, data": ("forward_kl", 0.0),
    "forward KL, half rollouts": ("forward_kl", 0.5),
    "reverse KL, data": ("reverse_kl", 0.0),
    "reverse KL, half rollouts": ("reverse_kl", 0.5),
}


def run(
    seed: int, folder: Path, *, steps: int, warm: int, documents: int, words: int, every: int, width: int, layers: int,
    prompt: int, arms: int,
) -> dict[str, Any]:  # fmt: skip
    """The first arms of one seed: what their students say, and what generation costs. prompt: its tokens; 0: random."""
    teacher = Brackets()
    cache = folder / "cache"
    fastkd.capture(
        teacher, teacher.words(documents, seed), cache, k=VOCAB, draws=0, packing="keep", context=SPACE, held_out=0.05,
        seed=seed, fingerprint="brackets", vocab_size=VOCAB,
    )  # fmt: skip
    common = TrainSettings(
        alpha=0.0, batch_size=32, rate=3e-3, seed=seed, evaluate_every=0, checkpoint_minutes=1e6, weight_decay=0.0,
        treatment="bucket",
    )  # fmt: skip
    fastkd.train(student_config(width, layers), cache, folder / "warm", replace(common, steps=warm))
    found = {"before": vars(measure(folder / "warm" / "student", teacher, count=words, seed=seed))}
    for number, (name, (divergence, fraction)) in enumerate(list(ARMS.items())[:arms]):
        settings = replace(common, steps=steps, divergence=divergence, rate=1e-3)
        rollouts = RolloutSettings(
            rollouts=fraction, rollout_tokens=SPACE - 2, rollout_every=every, rollout_batch=128,
            rollout_prompt=prompt or None,
        )  # fmt: skip
        out, begun = folder / f"arm-{number}", time.perf_counter()
        start = str(folder / "warm" / "student")
        more: dict[str, Any] = {"teacher": teacher, "rollouts": rollouts} if fraction else {}
        fastkd.train(start, cache, out, settings, **more)
        lines = read_metrics(out)
        spent = {"seconds": time.perf_counter() - begun}
        if fraction:
            spent["generate"] = sum(line.get("rollout/generate_seconds", 0.0) for line in lines)
            spent["score"] = sum(line.get("rollout/seconds", 0.0) for line in lines) - spent["generate"]
            spent["tokens_per_second"] = mean(x for line in lines if (x := line.get("rollout/tokens_per_second")))
        found[name] = {**vars(measure(out / "student", teacher, count=words, seed=seed)), **spent}
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, with intervals of 95% of the differences from the same divergence on data alone, paired by
    seed."""
    lines = ["| arm | valid words | reverse KL of a word | tokens | seconds | generation | scoring |", "|" + "---|" * 7]
    for name in runs[0]:
        of = [one[name] for one in runs]
        cells = [f"{mean(x['valid'] for x in of):.3f}", f"{mean(x['reverse_kl'] for x in of):.3f}"]
        base = name.partition(",")[0] + ", data"
        if base in runs[0] and name != base and len(runs) > 1:
            for i, key in enumerate(("valid", "reverse_kl")):
                difference = [one[name][key] - one[base][key] for one in runs]
                half = t_quantile(len(runs) - 1, 0.025) * stdev(difference) / len(runs) ** 0.5
                cells[i] += f" ({mean(difference):+.3f} ± {half:.3f})"
        seconds = f"{mean(x['seconds'] for x in of):.0f}" if "seconds" in of[0] else ""
        parts = [
            f"{mean(x[key] / x['seconds'] for x in of):.0%}" if key in of[0] else "" for key in ("generate", "score")
        ]
        lines.append(" | ".join([f"| {name}", *cells, f"{mean(x['tokens'] for x in of):.1f}", seconds, *parts]) + " |")
    rates = [x["tokens_per_second"] for one in runs for x in one.values() if "tokens_per_second" in x]
    return "\n".join([*lines, "", f"generation: {mean(rates):,.0f} tokens/s" if rates else ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("seeds", 3), ("steps", 200), ("warm", 500), ("documents", 3000), ("words", 600), ("every", 20), ("width", 32),
        ("layers", 2), ("prompt", 0), ("arms", len(ARMS)),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    seeds, path, runs = options.pop("seeds"), options.pop("json"), []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(seed, Path(folder), **options))
        print(table(runs), flush=True)
        if path is not None:
            path.write_text(json.dumps({"settings": options, "runs": runs}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
