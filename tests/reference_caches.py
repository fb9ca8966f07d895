"""Small caches that use all of the format, written and read with the installed Python and zarr. No torch.

    python tests/reference_caches.py write FOLDER       a sealed cache of one shard
    python tests/reference_caches.py read FOLDER FILE   what fastkd reads from it, into an .npz
    python tests/reference_caches.py plain FOLDER FILE  what plain zarr and FORMAT.md read from it
    python tests/reference_caches.py versions

tests/data holds caches that `write` made; see README.md there.
"""

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

N, VOCABULARY, K, DRAWS, TEMPERATURES = 60, 40, 4, 3, (1.0, 2.0)
SHARD = 2


def rows(seed: int) -> dict[str, np.ndarray]:
    """Arguments of `write_shard`: ties, rows of fewer top-k entries, draws, and rows that do not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 3, N).astype(np.int32)
    logits = np.round(rng.normal(size=(3, VOCABULARY))[tokens] * 6 + rng.normal(size=(N, VOCABULARY))) / 2
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    width = K + DRAWS
    ids, draws = np.zeros((2, N, width), np.int32)
    kept, tail = np.full((N, width), -np.inf, np.float32), np.full((N, len(TEMPERATURES)), -np.inf, np.float32)
    for i in range(N):
        if i % 7 == 3:
            continue
        head = K - i % 3
        rest = order[i, head:]
        drawn, times = np.unique(rng.integers(0, 12, DRAWS), return_counts=True)
        row = np.concatenate([order[i, :head], rest[drawn]])
        ids[i, : len(row)], kept[i, : len(row)] = row, logprobs[i, row]
        draws[i, head : len(row)] = times
        tail[i] = [np.log(np.exp(logprobs[i, rest] / t).sum()) for t in TEMPERATURES]
    inputs = {"tokens": tokens, "loss_mask": tokens != 1, "weight": rng.normal(size=N).astype(np.float32)}
    return {"inputs": inputs, "ids": ids, "logprobs": kept, "tail": tail, "draws": draws}


def write(folder: Path) -> None:
    from fastkd.cache import CacheSpec, Codec, create_cache

    spec = CacheSpec(
        vocab_size=VOCABULARY,
        k=K,
        draws=DRAWS,
        draw_temperature=1.5,
        temperatures=TEMPERATURES,
        codec=Codec(step=1 / 56, growth=0.3, cap=0.4, tail_step=1 / 16, draw_step=1 / 4, contexts=True, level=8),
        inputs=("tokens", "loss_mask", "weight"),
        teacher="a reference",
        notes=versions(),
    )
    with create_cache(folder, spec) as writer:
        lengths = {"sequence_lengths": [20, 39, 1], "document_lengths": [30, 30]}
        writer.write_shard(SHARD, **rows(SHARD), outcomes=VOCABULARY - K, **lengths, first_sequence=20)
        writer.seal()


def read(folder: Path) -> dict[str, np.ndarray]:
    from fastkd.cache import open_cache

    cache = open_cache(folder)
    report = cache.verify()
    assert report.ok, report.problems
    assert cache.shards == [SHARD]
    assert cache.zarr_group(SHARD)["head/counts"].shape == (N,)
    return cache.read_shard(SHARD)


def plain(folder: Path) -> dict[str, np.ndarray]:
    import plain_reader

    _, spec_hash = plain_reader.read_spec(folder)
    assert [row["shard"] for row in plain_reader.read_manifest(folder, spec_hash)] == [SHARD]
    return plain_reader.read_shard(folder, SHARD)


def versions() -> str:
    names = ("zarr", "numcodecs", "pcodec", "numpy", "pyarrow")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in names)])


if __name__ == "__main__":
    # zarr warns of pcodec, whose codec is not in the core of Zarr v3
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification", UserWarning)
    match sys.argv[1:]:
        case ["write", folder]:
            write(Path(folder))
        case ["read", folder, file]:
            np.savez_compressed(file, **read(Path(folder)))
        case ["plain", folder, file]:
            np.savez_compressed(file, **plain(Path(folder)))
        case ["versions"]:
            print(versions())
        case _:
            sys.exit(__doc__)
