"""Without a GPU, Triton kernels are interpreted, which must be set before triton is imported.

`pytest -m gpu tests/kernels` needs torch, triton, numpy and pytest alone, and no installation of fastkd.
"""

import gc
import os
import runpy
from pathlib import Path

# imports make objects that stay: to look for garbage among them takes a third of the time of collecting the tests
gc.disable()

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # the workers share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tests download nothing; transformers would try, and wait
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402

runpy.run_path(str(Path(__file__).parent.parent / "bench" / "bare.py"))["use_checkout"]()

THREADS = 1 if WORKER else None
if THREADS:
    torch.set_num_threads(THREADS)

HAS_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu if there is no GPU."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported is not garbage, and is not looked at again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _process_as_before():
    """Each test leaves the environment and the number of torch's threads as they were. A LOCAL_RANK that is left makes
    accelerate change the threads, on which the last bits of sums depend; some tests compare them with those of another
    process."""
    threads = THREADS or torch.get_num_threads()
    torch.set_num_threads(threads)
    environment = dict(os.environ)
    yield
    torch.set_num_threads(threads)
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """The interpreter uses NumPy, which warns of infinities and NaN that the kernels intend."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory):
    """Isolate cached files from those of the user and of other test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """What is so small is slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
