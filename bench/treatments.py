"""The effect of a treatment on the student's gradient: the error of one set of draws, and the bias.

    fastkd bench quality                                    # includes this, with another student
    .venv/bin/python bench/treatments.py --synthetic
    .venv/bin/python bench/treatments.py [--teacher PATH]   # transformers and a model: see make_tail_fixture.py

The truth is the dense teacher's gradient of T²·KL(teacher_T, student_T) with respect to the student's hidden states, in
float64. The student is an earlier layer of the teacher through the final norm and the same LM head (--layer: a poor
student), or the teacher with noise in its LM head (--noise: a good one), or everything is random (--synthetic). Errors
are norms over all positions, relative to the norm of the truth:

    one       error of one draw set (root mean square over R sets)
    mean      error of the mean gradient over R draw sets: the bias, plus noise
    chance    that noise: the spread of the sets over sqrt(R); an unbiased treatment has mean near chance
    bias      sqrt(mean² - chance²), or 0
    cosine    between one set's gradient and the truth, mean over the sets
    norm      of one set's gradient over the truth's, mean over the sets
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import SparseTargets, linear_kd_loss
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case
from fastkd.bench.table import Table

CELLS = ((1.0, 1.0), (1.0, 2.0), (1.0, 4.0), (1.5, 1.0), (1.5, 1.5), (1.5, 2.0))  # (T_d, T)
Cells = Sequence[tuple[float, float]]
SYNTHETIC = {"n": 64, "v": 8192, "d": 128}


class Problem(NamedTuple):
    """A teacher's logits, a student's hidden states, and the student's LM head."""

    teacher_NV: Tensor
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


def synthetic(n: int, v: int, d: int) -> Problem:
    """An LM head with a Zipf-like bias, a teacher's random hidden states, and a student's: the same with noise."""
    g = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(v, d, generator=g) / d**0.5
    bias_V = -torch.log(torch.arange(v) + 3.0)[torch.randperm(v, generator=g)]
    known_ND = 2.0 * torch.randn(n, d, generator=g)
    hidden_ND = known_ND + torch.randn(n, d, generator=g)
    return Problem(known_ND @ weight_VD.T + bias_V, hidden_ND, weight_VD, bias_V)


@torch.no_grad()
def real(path: Path | None, rows: int, layer: int, noise: float | None) -> Problem:
    """A model's logits over a text; its hidden states after `layer` layers, or its last ones and a noisy LM head."""
    from fastkd.bench.make_tail_fixture import places, text_windows
    from fastkd.bench.teacher import load_teacher

    model, tokenizer = load_teacher(path)
    at, last, earlier = places(8), [], []
    for window in text_windows(tokenizer, -(-rows // len(at))):
        states = model.model(
            window[None], output_hidden_states=True
        ).hidden_states  # the last one is normalized already
        last.append(states[-1][0, at])
        earlier.append(model.model.norm(states[layer][0, at]))
    known_ND, weight_VD = torch.cat(last)[:rows], model.lm_head.weight.detach()
    teacher_NV = known_ND @ weight_VD.T
    if noise is None:
        return Problem(teacher_NV, torch.cat(earlier)[:rows], weight_VD, None)
    g = torch.Generator().manual_seed(0)
    disturbed_VD = weight_VD + noise * weight_VD.std() * torch.randn(weight_VD.shape, generator=g)
    return Problem(teacher_NV, known_ND, disturbed_VD, None)


def dense(problem: Problem, t: float) -> tuple[Tensor, float]:
    """The true gradient of each row with respect to hidden `[N, D]`, float64; and KL(teacher_T, student_T) in nats."""
    weight_VD = problem.weight_VD.double()
    student_NV = problem.hidden_ND.double() @ weight_VD.T
    if problem.bias_V is not None:
        student_NV += problem.bias_V.double()
    log_p = (student_NV / t).log_softmax(1)
    log_q = (problem.teacher_NV.double() / t).log_softmax(1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    return t * (log_p.exp() - log_q.exp()) @ weight_VD, float(kl)


def gradient(problem: Problem, targets: SparseTargets, t: float, treatment: str) -> Tensor:
    """The gradient of the loss, float64, of each row (`num_items=1`: no division by the number of rows)."""
    leaf = problem.hidden_ND.clone().requires_grad_()
    found = linear_kd_loss(
        leaf, problem.weight_VD, targets, None, bias=problem.bias_V, temperature=t, treatment=treatment, num_items=1
    )
    found.loss.backward()
    assert leaf.grad is not None
    return leaf.grad.double()


class Tally:
    """Errors of a sequence of gradients against the truth, without storing them."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.sum, self.squares, self.count = truth, torch.zeros_like(truth), 0.0, 0
        self.cosines, self.norms = 0.0, 0.0

    def add(self, found: Tensor) -> None:
        """Add the gradient of one draw set."""
        self.sum += found - self.truth
        self.squares += float((found - self.truth).square().sum())
        norm, size = float(found.norm()), float(self.truth.norm())
        self.cosines += float((found * self.truth).sum()) / (norm * size)
        self.norms += norm / size
        self.count += 1

    def figures(self) -> dict[str, float]:
        """The errors that the module's docstring lists."""
        size, r = float(self.truth.norm()), self.count
        mean = float(self.sum.norm()) / r
        one = (self.squares / r) ** 0.5
        chance = (max(one**2 - mean**2, 0.0) / (r - 1)) ** 0.5 if r > 1 else 0.0
        bias = max(mean**2 - chance**2, 0.0) ** 0.5
        errors = {"one": one / size, "mean": mean / size, "chance": chance / size, "bias": bias / size}
        return errors | {"cosine": self.cosines / r, "norm": self.norms / r}


def run(problem: Problem, k: int, draws: int, sets: int, cells: Cells = CELLS) -> list[dict[str, Any]]:
    """All cells, with top-k entries and draws, and with draws alone. One seed's targets serve all temperatures."""
    truths = {t: dense(problem, t) for t in sorted({t for _, t in cells})}
    rows: list[dict[str, Any]] = []
    for head, drawn in ((k, draws), (0, k + draws)):
        for drawn_at in sorted({t_d for t_d, _ in cells}):
            tallies = {t: Tally(truths[t][0]) for t_d, t in cells if t_d == drawn_at}
            for seed in range(sets):
                targets = SparseTargets.from_logits(
                    problem.teacher_NV, head, draws=drawn, draw_temperature=drawn_at, seed=seed
                )
                for t, tally in tallies.items():
                    tally.add(gradient(problem, targets, t, "sampled"))
            name = f"sampled, {head} + {drawn} from T_d = {drawn_at:g}"
            rows += [{"targets": name, "T": t, **tally.figures()} for t, tally in tallies.items()]
    for size in (k, k + draws):  # the same top-k entries, and the same number of entries
        targets = SparseTargets.from_logits(problem.teacher_NV, size)
        for treatment in ("bucket", "renormalize"):
            for t, (truth, _) in truths.items():
                tally = Tally(truth)
                tally.add(gradient(problem, targets, t, treatment))
                rows.append({"targets": f"{treatment}, {size}", "T": t, **tally.figures()})
    for row in rows:
        row["kl"] = truths[row["T"]][1]
    return sorted(rows, key=lambda row: row["T"])


def bench(
    table: Table, make: Callable[[], Problem], what: str, k: int, draws: int, sets: int, cells: Cells = CELLS
) -> None:
    """Add two rows for each treatment and temperature."""
    problem = make()
    n, v = problem.teacher_NV.shape
    last = None
    for row in run(problem, k, draws, sets, cells):
        if row["T"] != last:
            last = row["T"]
            head = problem.teacher_NV.div(last).softmax(1).topk(k).values.sum(1).mean()
            table.title(f"{what}, N={n} V={v} D={problem.weight_VD.shape[1]}, {sets} draw sets, T={last:g}")
            note = f"mass outside the top {k}: {1 - head:.3f}"
            table.value("KL from the teacher to the student", row["kl"], "nats", note=note)
        note = ", ".join(f"{key} {row[key]:.4f}" for key in ("mean", "chance", "bias"))
        table.value(f"{row['targets']}: error of one", row["one"], "of the gradient", better="lower", note=note)
        note = f"norm over the dense gradient's {row['norm']:.3f}"
        table.value(f"{row['targets']}: cosine", row["cosine"], "with it", better="higher", note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", action="store_true", help="a random teacher, which needs no model")
    parser.add_argument("--teacher", type=Path, help="a folder that transformers can load, or a GGUF file")
    parser.add_argument("--layer", type=int, default=25, help="layer after which the student's hidden states are taken")
    parser.add_argument("--noise", type=float, help="instead, noise in the LM head, relative to its standard deviation")
    parser.add_argument("--rows", type=int, default=64, help="positions")
    parser.add_argument("--sets", type=int, default=64, help="R, the number of draw sets")
    parser.add_argument("--k", type=int, default=48)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    if args.sets < 2 or args.rows < 1:
        parser.error("--sets must be at least 2, --rows at least 1")
    student = f"layer {args.layer}" if args.noise is None else f"the teacher with noise {args.noise:g} in its head"
    what = "synthetic teacher" if args.synthetic else f"student: {student}"
    make = partial(synthetic, **SYNTHETIC) if args.synthetic else partial(
        real, args.teacher, args.rows, args.layer, args.noise
    )  # fmt: skip
    table = Table("cpu", "treatments")
    run_cases(
        [Case(what, partial(bench, make=make, what=what, k=args.k, draws=args.draws, sets=args.sets))], table, to_stderr
    )
    table.save(args.json)


if __name__ == "__main__":
    main()
