"""What earlier versions accepted: a warning where it still means something, an error that names the new way else."""

import subprocess
import sys
from pathlib import Path

import pytest
from train_cases import make_cache

from fastkd import DistillLoader, targets_from_raw
from fastkd.errors import StreamError


def test_decode_on_the_host_warns_and_anything_else_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    with pytest.warns(DeprecationWarning, match="always decoded on the host") as caught:
        DistillLoader(cache, batch_size=4, decode="host")
    assert caught[0].filename == __file__
    with pytest.raises(StreamError, match=r"decode: got 'device'; expected no value.*on the host now"):
        DistillLoader(cache, batch_size=4, decode="device")


def test_raw_streams_are_no_longer_decoded_on_a_device() -> None:
    with pytest.raises(StreamError, match=r"on the host now.*read_shard"):
        targets_from_raw({})


MOVED = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastkd.teacher.protocol import Head, Hidden, Teacher
    from fastkd.student.evaluate import compare, evaluate
print([str(w.message) for w in caught if w.category is DeprecationWarning and "fastkd" in str(w.message)])
import fastkd.evaluate, fastkd.teachers
assert (Head, Hidden, Teacher) == (fastkd.teachers.LMHead, fastkd.teachers.Hidden, fastkd.teachers.Teacher)
assert (compare, evaluate) == (fastkd.evaluate.compare, fastkd.evaluate.evaluate)
try:
    from fastkd.teacher.protocol import Nothing
except ImportError:
    print("no such name")
"""


def test_documented_modules_are_found_in_their_former_places() -> None:
    done = subprocess.run([sys.executable, "-c", MOVED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages, other = done.stdout.splitlines()
    assert "fastkd.teacher.protocol has moved: import from fastkd.teachers." in messages
    assert "fastkd.student.evaluate has moved: import from fastkd.evaluate." in messages
    assert other == "no such name"
