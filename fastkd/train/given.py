"""What a student was named by, and whether that still stands for the same."""

import hashlib
from pathlib import Path

from ..utils.factories import is_factory, module_file


def given_name(source: str | Path) -> str:
    """What names a student, wherever it is said: a text, or the whole path of a folder or file."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def given_files(source: str | Path) -> str | None:
    """A hash that changes when what is named is changed: of a folder or file the names, sizes and times of its files,
    of module:factory the module's source. None where there are no files to look at: of a name on the Hub."""
    found, path = hashlib.sha256(), Path(source)
    if path.exists():
        for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if one.is_file():
                status = one.stat()
                found.update(f"{one.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return found.hexdigest()
    file = module_file(str(source)) if is_factory(str(source)) else None
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
