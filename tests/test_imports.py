"""The cost of imports, and their direction: two leaves and one root."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
"""


def python(code: str, blocked: tuple[str, ...] = ()) -> str:
    """Run code in a new interpreter in which some packages cannot be imported."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_fastkd_is_lazy() -> None:
    loaded = python("import fastkd; print(*sys.modules)", blocked=("torch", "triton", "zarr", "numpy")).split()
    assert "fastkd" in loaded
    assert not {"torch", "triton", "zarr", "numpy"} & set(loaded)


def test_fastkd_stream_is_lazy() -> None:
    """The order needs NumPy alone."""
    code = "import fastkd.stream; fastkd.stream.order([3, 4], 0, 0).take(0, 7); print(*sys.modules)"
    assert "numpy" in python(code, blocked=("torch", "triton", "zarr")).split()


def test_every_name_is_there_and_no_other() -> None:
    import fastkd

    for name in fastkd.__all__:
        assert getattr(fastkd, name) is not None
        assert name in dir(fastkd)
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = fastkd.nothing


def test_kernels_need_torch_alone() -> None:
    """Without triton and zarr the CPU path works, and impl="triton" raises an error that names what is missing."""
    code = """
import torch, fastkd
z = torch.randn(4, 20)
targets = fastkd.SparseTargets.from_logits(torch.randn(4, 20), 3)
loss = fastkd.kd_loss(z.requires_grad_(), targets, torch.tensor([1, 2, 3, 4])).loss
loss.backward()
print(float(loss.detach()) > 0, "triton" in sys.modules)
try:
    fastkd.kd_loss(z, targets, torch.tensor([1, 2, 3, 4]), impl="triton")
except fastkd.KDError as error:
    print("cannot be imported" in str(error))
"""
    assert python(code, blocked=("triton", "zarr", "numcodecs", "pyarrow")).split() == ["True", "False", "True"]


def test_cache_never_imports_torch() -> None:
    assert "torch" not in python("import fastkd.cache; print(*sys.modules)", blocked=("torch", "triton")).split()


def test_what_only_some_models_need_is_not_imported() -> None:
    """Divided models and torch.compile bring SymPy, and take as long to import as torch itself."""
    code = "import fastkd.capture.api, fastkd.evaluate.api; fastkd.kd_loss; print(*sys.modules)"
    loaded = set(python(code).split())
    assert not {"torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "sympy"} & loaded


def imports(folder: str) -> set[str]:
    """Every module a folder's files import, relative ones as fastkd's."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        depth = (
            len(path.relative_to(ROOT / folder).parts) - 1
        )  # relative imports of this many levels stay inside the package
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add("." * (node.level - min(depth, max(node.level - 1, 0))) + (node.module or ""))
    return found


@pytest.mark.parametrize("folder", ["cache", "kernels"])
def test_leaves_know_neither_each_other_nor_the_root(folder: str) -> None:
    names = imports(folder)
    assert not [n for n in names if n.startswith(("fastkd", "..", "cache", "kernels"))]
    assert "torch" not in names or folder == "kernels"
    assert not {"zarr", "numcodecs", "pyarrow"} & names or folder == "cache"


def test_typed() -> None:
    for folder in ("fastkd", "cache", "kernels"):
        assert (ROOT / folder / "py.typed").exists()
