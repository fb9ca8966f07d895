"""Everything to measure on a GPU in one command, on a machine with torch, triton, numpy and pytest alone.

    python bench/gpu_day.py --deadline 540 --json OUT           # run it again to resume
    python bench/gpu_day.py --deadline 540 --json OUT --peers   # other packages, in a second call
    python bench/gpu_day.py --toy --json OUT                    # tiny sizes on a CPU, interpreted: does it run?

Exit status: 0 if all is done and every bound holds, 1 if a bound is missed, a test fails or a step cannot run, 3 if the
deadline came first.
"""

import argparse
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    begun = time.monotonic()
    import numpy as np
    import torch

    from fastkd.bench import first_day
    from fastkd.bench.table import Table
    from fastkd.errors import ReportError

    parser = argparse.ArgumentParser(
        prog="gpu_day.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which nothing more is begun")
    parser.add_argument(
        "--json",
        type=Path,
        help="file of recordings, rewritten after each step; steps that ended are not run again, except smoke, which "
        "always runs, and a compile step, which runs while a step that it compiles for is left",
    )
    parser.add_argument("--peers", action="store_true", help="measure other packages, and nothing else")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU, interpreted")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps that begin with one of these words")
    parser.add_argument("--list", action="store_true", help="list the steps")
    parser.add_argument("--warm", metavar="STEP", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not args.list and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --toy shows whether the command runs, on a CPU")
    # imports triton
    from fastkd.bench.day_steps import Sizes, steps_of

    steps = steps_of(Sizes.toy() if args.toy else Sizes(), peers=args.peers)
    if args.toy:
        np.seterr(all="ignore")  # the interpreter computes with infinities and NaN, as the kernels mean to
    if args.only:
        for word in args.only:
            if not any(step.name.startswith(word) for step in steps):
                listed = " ".join(["--toy"] * args.toy + ["--peers"] * args.peers + ["--list"])
                parser.error(f"--only: no step begins with '{word}'; {listed} shows them")
        steps = [step for step in steps if step.name.startswith(tuple(args.only))]
    if args.list:
        print("\n".join(f"  {step.name:<40} {step.seconds:.0f} s" for step in steps))
        return first_day.OK
    device = "cpu" if args.toy else "cuda"
    if args.warm:
        step = next(step for step in steps if step.name == args.warm)
        assert step.warm is not None
        step.warm(Table(device))
        return first_day.OK
    try:
        day = first_day.Day(args.json, device, "toy" if args.toy else "day")
    except ReportError as error:
        parser.error(str(error))
    if args.toy:
        print("toy: numbers mean nothing; the steps only show that they run")
    return first_day.run(day, steps, args.deadline, begun=begun)


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("bare.py")))["use_checkout"]()
    sys.exit(main())
