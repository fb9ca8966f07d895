"""Whether optional packages are installed, before work begins that needs them at its end. Imports none of them."""

import importlib.util
from collections.abc import Sequence

PAGES = ("jinja2", "matplotlib")
"""What pages with charts are made with, of the extra `report`."""


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def check_packages(packages: Sequence[str], extra: str, what: str, error: type[Exception]) -> None:
    """Raise `error` if a package of an extra is not installed. what: needs them, as the beginning of a sentence."""
    if missing := [package for package in packages if not is_installed(package)]:
        raise error(f"{what} needs {', '.join(missing)}, not installed here. Use pip install 'fastkd[{extra}]'.")
