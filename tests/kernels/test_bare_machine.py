"""The tests of kernels on a GPU need torch, triton, numpy and pytest alone; and one of them cannot spoil the next."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import nothing_waits

ROOT = Path(__file__).parent.parent.parent
MISSING = (
    "accelerate", "gguf", "hypothesis", "lazy_loader", "liger_kernel", "matplotlib", "moto", "numba", "numcodecs",
    "obstore", "pcodec", "pyarrow", "pytest_benchmark", "safetensors", "sklearn", "tokenizers", "tqdm", "transformers",
    "tyro", "xdist", "zarr",
)  # fmt: skip
# -S: without the packages' own start-up files, one of which may map fastkd to a checkout
BARE = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.path += {[path for path in sys.path if path and not Path(path, "fastkd").is_dir()]!r}
"""


def on_a_bare_machine(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-c", BARE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


def test_gpu_tests_of_kernels_are_collected_on_a_bare_machine(tmp_path: Path) -> None:
    options = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    code = f"import os, pytest\nos.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\nsys.exit(pytest.main({options!r} + "
    done = on_a_bare_machine(code + f"[{str(ROOT / 'tests' / 'kernels')!r}]))", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"(\d+)/\d+ tests collected", done.stdout)
    assert found, done.stdout[-1000:]
    assert int(found[1]) > 300
    assert "error" not in done.stdout.splitlines()[-1]


def test_torch_s_alarm_is_always_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it warns after it is set."""
    import warnings

    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with nothing_waits():
        assert modes == ["error"]
    with pytest.raises(RuntimeError, match="waited"), nothing_waits():
        raise RuntimeError("waited")
    assert modes == ["error", "default"] * 2
