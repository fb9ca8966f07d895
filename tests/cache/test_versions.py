"""Other versions of Python, zarr and the compressors: caches of theirs are read here, and those of here there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import plain_reader
import pytest
import reference_caches

from fastkd.cache import open_cache

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "reference_caches.py"
REFERENCES = ROOT / "tests" / "data" / "reference_caches"
CACHES = sorted(path.parent.name for path in REFERENCES.glob("*/spec.json"))
OTHER = os.environ.get("FASTKD_OTHER_PYTHON", "")
# zarr warns of pcodec, whose codec is not in the core of Zarr v3
pytestmark = pytest.mark.filterwarnings(
    "ignore:Numcodecs codecs are not in the Zarr version 3 specification:UserWarning"
)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_there_are_references() -> None:
    assert len(CACHES) >= 2


@pytest.mark.parametrize("name", CACHES)
def test_a_reference_is_read_as_ever(name: str) -> None:
    """By fastkd and by the specification's reader; and it has everything that the format has."""
    with np.load(REFERENCES / "expected.npz") as file:
        expected = dict(file)
    same(reference_caches.read(REFERENCES / name), expected)
    same(reference_caches.plain(REFERENCES / name), expected)
    cache = open_cache(REFERENCES / name)
    assert cache.sealed
    streams = cache.zarr_group(reference_caches.SHARD)
    for stream in ("head/ties", "draws/repeats", "draws/ties", "head/context_tokens", "outcomes", "document_lengths"):
        assert streams[stream].size, stream
    assert 0 in streams["head/counts"][:]
    sequences = cache.sequences([21, 20])
    np.testing.assert_array_equal(sequences["ids"], np.concatenate([expected["ids"][20:59], expected["ids"][:20]]))


def test_the_same_targets_still_decode_to_the_same(tmp_path: Path) -> None:
    reference_caches.write(tmp_path)
    for name in CACHES:
        old, new = (open_cache(path).read_shard(reference_caches.SHARD) for path in (REFERENCES / name, tmp_path))
        for field in ("ids", "draws", "outcomes", "tokens"):
            np.testing.assert_array_equal(new[field], old[field], err_msg=field)
        for field in ("logprobs", "tail"):
            np.testing.assert_allclose(new[field], old[field], atol=1e-5, err_msg=field)


@pytest.mark.soak
@pytest.mark.skipif(not OTHER, reason="FASTKD_OTHER_PYTHON names no other Python (one with zarr, pcodec and pyarrow)")
def test_each_reads_the_others(tmp_path: Path) -> None:
    """fastkd.cache and plain zarr, under both interpreters, on caches that each of them wrote."""
    package = tmp_path / "package" / "fastkd"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "fastkd" / "__init__.py", package)
    shutil.copytree(ROOT / "cache", package / "cache", ignore=shutil.ignore_patterns("__pycache__"))

    def run(python: str, *arguments: object) -> str:
        # neither fastkd nor anything else of this interpreter's reaches the other
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV")}
        environment["PYTHONPATH"] = str(package.parent)
        command = [python, str(SCRIPT), *map(str, arguments)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{python}: {result.stderr}"
        return result.stdout

    pythons = {"here": sys.executable, "there": OTHER}
    versions = {where: run(python, "versions") for where, python in pythons.items()}
    print(*versions.values(), sep="")
    assert versions["here"] != versions["there"], "FASTKD_OTHER_PYTHON has the same versions as this one"
    for writer, python in pythons.items():
        run(python, "write", tmp_path / writer)
        found = []
        for reader, other in pythons.items():
            for mode in ("read", "plain"):
                file = tmp_path / f"{writer}-{reader}-{mode}.npz"
                run(other, mode, tmp_path / writer, file)
                with np.load(file) as arrays:
                    found.append(dict(arrays))
        for arrays in found[1:]:
            same(arrays, found[0])
    specs = [plain_reader.read_spec(tmp_path / where)[1] for where in pythons]
    assert specs[0] == specs[1]
