"""A machine that has torch, triton, numpy and pytest alone, and fastkd as a checkout that is not installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# and what these four import
PACKAGES = (
    "torch", "torchgen", "functorch", "triton", "numpy", "pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging",
    "pygments", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "_distutils_hack",
    "sympy", "typing_extensions", "nvidia", "cuda",
)  # fmt: skip


def run_bare(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python there, in a folder in which links to these packages are made."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None:
            continue
        places = list(spec.submodule_search_locations or []) or [str(spec.origin)]
        for place in {Path(places[0]), *Path(places[0]).parent.glob(f"{name}.libs")}:
            if not (site / place.name).exists():
                (site / place.name).symlink_to(place)
    # -S: without the site-packages of this interpreter, one of whose files may map fastkd to a checkout
    command = [sys.executable, "-S", *arguments]
    # plugins that the tests here are run with may not be there
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment | {"PYTHONPATH": str(site)}
    )
