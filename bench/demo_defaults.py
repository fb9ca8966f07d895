"""The demo's defaults over several seeds: students against their controls, paired by held-out window.

    python bench/demo_defaults.py --student demo/cut-5 --cache CACHE --out FOLDER --alpha 0.2 0.5 --steps 24

CACHE: documents of equal length, more than a seed needs (`fastkd capture --packing keep`). Seed s trains on `--windows`
of them, from number s * stride on, in its own order; the control (alpha 1) is always included. Finished runs are kept,
so the same command resumes.
"""

import argparse
import json
import shutil
from pathlib import Path

import fastkd
from fastkd.cache import open_cache
from fastkd.evaluate.api import Evaluation, compare
from fastkd.evaluate.measures import DEMO, printed_in
from fastkd.settings import TrainSettings
from fastkd.train.api import EVALUATION
from fastkd.train.checkpoint import FOLDER as CHECKPOINTS
from fastkd.utils.signals import Stop, stopping

MEASURES = [measure.name for measure in printed_in(DEMO)]


def trained(student: str, cache: str, out: Path, settings: TrainSettings, stop: Stop) -> Evaluation:
    """The evaluation of a run, which is trained unless it exists."""
    if (out / CHECKPOINTS).exists() or not (out / EVALUATION).exists():
        if not fastkd.train(student, cache, out, settings, progress="lines", stop=stop).complete:
            raise SystemExit(75)
        shutil.rmtree(out / "student")  # the weights and optimizer states of all runs would take gigabytes
        shutil.rmtree(out / CHECKPOINTS)
    return Evaluation.from_json(json.loads((out / EVALUATION).read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "cache", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.3])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=16, help="windows to train on, per seed")
    parser.add_argument("--stride", type=int, default=16, help="windows between the first ones of two seeds")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--warmup", type=float, default=0.2, help="share of the steps that warm up")
    parser.add_argument("--held-out", type=int, default=48, help="held-out windows to evaluate on")
    args = parser.parse_args()
    with stopping() as stop:
        table(args, stop)


def table(args: argparse.Namespace, stop: Stop) -> None:
    """Print a row for each seed and alpha."""
    lengths = open_cache(args.cache).sequence_lengths(0)
    for seed in args.seeds:
        common = TrainSettings(
            steps=args.steps, batch_size=args.batch, rate=args.rate, warmup=args.warmup, seed=seed,
            skip=seed * args.stride,
            max_positions=args.windows * int(lengths[0]), evaluate_every=args.steps, checkpoint_minutes=1,
            evaluate_positions=args.held_out * int(lengths[0]),
        )  # fmt: skip
        arms = [(1.0, 1.0), *((alpha, args.temperature) for alpha in args.alpha)]
        control: Evaluation | None = None
        for alpha, temperature in arms:
            changes = {"alpha": alpha, "temperature": temperature}
            name = f"w{args.windows}-s{args.steps}-r{args.rate:g}-u{args.warmup:g}-a{alpha:g}-t{temperature:g}-{seed}"
            found = trained(
                args.student, args.cache, Path(args.out) / name, TrainSettings(**vars(common) | changes), stop
            )
            control = control or found
            of = found.intervals()
            cells = [f"{of[m].mean:8.4f}" for m in MEASURES]
            if found is not control:
                pairs = compare(found, control)
                cells += [f"{pairs[m].mean:+8.4f} ± {pairs[m].half:.4f}" for m in MEASURES]
            print(f"seed {seed}  alpha {alpha:<4g} T {temperature:<4g}" + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
