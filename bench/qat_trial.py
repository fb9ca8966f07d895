"""What 4 bits cost a student of the demo: trained with quantised weights (`--quantize`), and quantised afterwards.

    fastkd demo --out demo && fastkd demo --task digits --out demo
    python bench/qat_trial.py --demo demo                        # one training of the language demo's length
    python bench/qat_trial.py --demo demo --digits --after 338   # six short trainings of the digits' student
    python bench/qat_trial.py --cost                             # a step with quantised weights, over one without

Three students of the same steps, on the same batches: without quantisation; that one, quantised afterwards; and one
that was trained with quantised weights from a step on. KL divergence to the teacher on the held-out windows, in
nats. The ratios are of KL, and of what is added to the KL of the first: after training with quantised weights, over
quantised afterwards. Intervals: 95%, of windows resampled in pairs.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import fastkd
from fastkd.bench.bench_match import Step
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.demo.digits import TRAINING, Sizes
from fastkd.demo.digits_inputs import digits, new_net
from fastkd.evaluate.api import evaluate
from fastkd.evaluate.result import Evaluation, Windows
from fastkd.models.quantization import SCHEMES
from fastkd.train.api import EVALUATION
from fastkd.train.fake_quantisation import FakeQuantisation
from fastkd.train.student import make_student
from fastkd.utils.intervals import Interval, bootstrap_interval, ratio_interval

KL = "kl_bucket"
SAME = ("steps", "batch_size", "warmup", "alpha", "rate")
"""Settings of the language demo's student that its training with quantised weights has too."""


def measured(student: Any, cache: Path, scheme: str | None, data: Any = None) -> Windows:
    """The measures of a student by window. scheme: with quantised weights (and inputs, in int8)."""
    made = make_student(student, None, data=data).student
    if scheme is not None:
        made.fake = FakeQuantisation(made.model, made.name, SCHEMES[scheme], 0)
        made.fake.enable(True)
    return evaluate(made, cache, data=data).student


def ratios(plain: Windows, after: Windows, trained: Windows) -> dict[str, Interval]:
    """Of KL, and of what is added to it: trained with quantised weights, over quantised afterwards."""
    use = plain.counts > 0
    kl = [one.sums[KL][use] for one in (plain, after, trained)]
    count = int(use.sum())
    return {
        "KL": bootstrap_interval(lambda times: (times @ kl[2]) / (times @ kl[1]), count),
        "added KL": bootstrap_interval(lambda times: (times @ (kl[2] - kl[0])) / (times @ (kl[1] - kl[0])), count),
    }


def show(plain: Windows, after: Windows, trained: Windows) -> None:
    names = ("without quantisation", "quantised afterwards", "trained with quantised weights")
    for name, one in zip(names, (plain, after, trained), strict=True):
        use = one.counts > 0
        found = ratio_interval(one.sums[KL][use], one.counts[use])
        print(f"  {name:32} KL {found.mean:.4f} ± {found.half:.4f}")
    for name, one in (("quantised afterwards", after), ("trained with quantised weights", trained)):
        found = one.minus(plain)[KL]
        print(f"  {name:32} added {found.mean:+.4f} ± {found.half:.4f}, paired")
    found = trained.minus(after)[KL]
    print(f"  the latter minus the former        {found.mean:+.4f} ± {found.half:.4f}, paired")
    for name, ratio in ratios(plain, after, trained).items():
        print(f"  ratio of {name:23} {ratio.mean:.3f} ± {ratio.half:.3f}", flush=True)


def language(demo: Path, out: Path, scheme: str, more: dict[str, Any]) -> None:
    """The pruned student of the demo, healed with quantised weights, beside the demo's own."""
    settings = json.loads((demo / "healed" / "run.json").read_text())["settings"]
    changes = {name: settings[name] for name in SAME} | {"quantize": scheme} | more
    changes["evaluate_every"] = changes["steps"]
    (pruned,) = sorted(demo.glob("cut-*"))
    fastkd.train(pruned, demo / "cache", out / "language", progress="lines", **changes)
    # both evaluations are of the last step, that of the second with quantised weights
    plain, trained = (
        Evaluation.from_json(json.loads((run / EVALUATION).read_text())).student
        for run in (demo / "healed", out / "language")
    )
    print(f"language demo, {scheme}, {changes}")
    show(plain, measured(demo / "healed" / "student", demo / "cache", scheme), trained)


def of_digits(demo: Path, out: Path, scheme: str, more: dict[str, Any], floor: float, seeds: int) -> None:
    """The student of the digits without features, of several seeds; sums over them are shown.

    floor: the last rate of all trainings, as a fraction of the peak. At the demo's 0.1, two trainings differ by more
    than quantisation costs, at 0 by less.
    """
    sizes, cache = Sizes(), demo / "digits" / "cache"
    data = digits(0, images=sizes.images, copies=sizes.copies)
    arms: dict[str, list[Windows]] = {"plain": [], "after": [], "trained": []}

    def train(name: str, seed: int, **changes: Any) -> Any:
        make = partial(new_net, sizes.student_width, seed + 1)
        given: dict[str, Any] = {"data": data, "epochs": float(sizes.epochs), "seed": seed, "evaluate_every": 0}
        given["rate_floor"] = floor
        report = fastkd.train(make, cache, out / f"{name}-{seed}", **{**given, **TRAINING, **changes})
        net = make()
        net.load_state_dict(load_file(Path(str(report.student)) / "model.safetensors"))
        return net

    for seed in range(seeds):
        plain = train("plain", seed)
        arms["plain"].append(measured(plain, cache, None, data))
        arms["after"].append(measured(plain, cache, scheme, data))
        trained = train(scheme, seed, quantize=scheme, **more)
        arms["trained"].append(measured(trained, cache, scheme, data))
    print(f"digits, {scheme}, rate_floor {floor:g}, {more}, seeds 0 to {seeds - 1}")
    for each in zip(*arms.values(), strict=True):
        print("  KL of a seed: " + ", ".join(f"{one.sums[KL].sum() / one.counts.sum():.4f}" for one in each))
    show(*(Windows(one[0].counts, {KL: np.mean([w.sums[KL] for w in one], 0)}) for one in arms.values()))


def cost(scheme: str, rounds: int) -> None:
    """Core time of a step of 1,024 positions of a student of 29M parameters, most of them in embedding and LM head."""
    table = Table("cpu")
    runs = {"without": Step("cpu", None), scheme: Step("cpu", None)}
    student = runs[scheme].student
    student.fake = FakeQuantisation(student.model, student.name, SCHEMES[scheme], 0)
    student.fake.enable(True)
    times = interleaved(runs, device="cpu", rounds=rounds, core_time=True)
    table.title(f"a step of {runs['without'].batch.positions} positions in one micro-batch")
    for name in times:
        table.value(name, times.time(name), "ms")
    table.ratio(scheme, times.ratio(scheme, "without"), "without quantisation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the folder of `fastkd demo --out`")
    parser.add_argument("--digits", action="store_true", help="the digits' student instead of the language model")
    parser.add_argument("--cost", action="store_true", help="time of a step, and nothing else")
    parser.add_argument("--out", type=Path, help="folder of the trainings, which are resumed; default: DEMO/qat")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="int4")
    parser.add_argument("--after", type=int, help="quantize_after; default: that of the setting")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: the demo's")
    parser.add_argument("--seeds", type=int, default=3, help="of the digits")
    parser.add_argument("--rounds", type=int, default=5, help="of --cost")
    parser.add_argument("--floor", type=float, default=0.0, help="rate_floor of all trainings of the digits")
    given = parser.parse_args()
    more = {"quantize_after": given.after, "rate": given.rate}
    more = {name: value for name, value in more.items() if value is not None}
    named = more | ({"floor": given.floor} if given.digits else {})
    out = (given.out or given.demo / "qat") / "-".join([given.scheme, *(f"{n}={v}" for n, v in named.items())])
    if given.cost:
        cost(given.scheme, given.rounds)
    elif given.digits:
        of_digits(given.demo, out, given.scheme, more, given.floor, given.seeds)
    else:
        language(given.demo, out, given.scheme, more)


if __name__ == "__main__":
    main()
