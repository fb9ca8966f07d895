"""The files that names stand for, and what opens each of them, by its suffix.

tables   Parquet, Arrow, JSON, CSV: a document per row, in a column
text     .txt: divided by text_documents
source   .py, .md, .c, ...: a document per file
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .byte_files import COMPRESSED
from .columns import ArrowColumn, Column, ParquetColumn
from .csv_files import DELIMITERS, CsvColumn
from .json_files import JsonColumn
from .lines import TextColumn

Open = Callable[[Path, str | None, str], Column]
"""From a path, a column and text_documents."""

_WHOLE: dict[str, Open] = {
    **dict.fromkeys((".parquet", ".pq"), lambda path, column, _: ParquetColumn(path, column)),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), lambda path, column, _: ArrowColumn(path, column)),
}
_LINES: dict[str, Open] = {  # may be compressed
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), lambda path, column, _: JsonColumn(path, column)),
    ".txt": TextColumn,
    ".text": TextColumn,
    **dict.fromkeys(DELIMITERS, lambda path, column, _: CsvColumn(path, column)),
}
_FIRST = (_WHOLE | _LINES).keys() - DELIMITERS.keys()
"""Of a folder with such files, no others are read."""
_LANGUAGES = """
    .py .pyi .pyx .md .rst .tex .c .h .cc .cpp .cxx .hpp .hh .hxx .cu .cuh .m .mm .java .kt .kts .scala .groovy
    .js .jsx .mjs .ts .tsx .vue .svelte .go .rs .rb .php .swift .dart .cs .fs .vb .r .jl .lua .pl .pm .hs .ml .mli
    .ex .exs .erl .clj .cljs .lisp .el .scm .rkt .f .f90 .f95 .pas .adb .ads .asm .s .v .sv .vhd .vhdl .zig .nim .d
    .sh .bash .zsh .fish .ps1 .sql .proto .graphql .tf .cmake .html .htm .css .scss .less
"""
SOURCE = frozenset(_LANGUAGES.split())
_OF_REPOSITORIES = {".txt", ".text", ".json"}  # what lies beside source files
_OF_DATA_SETS = {".md"}  # what lies beside data
_SKIPPED = {"node_modules", "__pycache__"}  # folders, beside hidden ones
_URL = re.compile(r"(\w{2,}):/+(?!$)")
KNOWN = f"{', '.join([*_WHOLE, *_LINES])} (of these, text and lines may end in .gz or .zst), or of source files"


@dataclass(frozen=True)
class Files:
    """The files of a source, in order. left_out: others in its folders, that are not read since there are data."""

    paths: list[Path]
    left_out: list[Path]


def kind_of(path: Path) -> str | None:
    """ "tables", "text" or "source"; None for a file of an unknown suffix."""
    suffix = _suffix(path)
    if suffix in _LINES or (suffix in _WHOLE and not _is_compressed(path)):
        return "text" if suffix in (".txt", ".text") else "tables"
    return "source" if suffix in SOURCE and not _is_compressed(path) else None


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def _suffix(path: Path) -> str:
    """That of the contents, in lower case."""
    return (Path(path.stem) if _is_compressed(path) else path).suffix.lower()


def open_column(path: Path, column: str | None, text_documents: str) -> Column:
    """The documents of one file of a known kind."""
    if kind_of(path) == "source":
        return TextColumn(path, column, "file" if text_documents == "line" else text_documents)
    return (_WHOLE | _LINES)[_suffix(path)](path, column, text_documents)


def files_of(names: Iterable[str | Path]) -> Files:
    """The files of names: a file itself; of a folder, its data or else its source files; of a pattern, its matches.

    Raises DataError for what is none, of an unknown suffix, or of several kinds.
    """
    paths, left_out = [], []
    for name in names:
        found = _expand(name)
        paths += found.paths
        left_out += found.left_out
    for path in paths:
        if path.is_dir():
            raise DataError(
                f"{path}: got a folder among the matches of a pattern; expected files. Name the folder, or a pattern "
                "such as '**/*.py'."
            )
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path}: got a pipe or a device; expected a regular file, of which rows are read by number."
            )
        if kind_of(path) is None:
            raise DataError(f"{path}: got an unknown suffix; expected one of {KNOWN}.")
    return Files(paths, left_out)


def check_one_kind(paths: Iterable[Path], text_documents: str) -> None:
    """DataError for source files beside others; text files are like them if a document is a file."""
    alike = {"text": "source"} if text_documents == "file" else {}
    first: dict[str, Path] = {}
    for path in paths:
        kind = str(kind_of(path))
        first.setdefault(alike.get(kind, kind), path)
    if "source" in first and len(first) > 1:
        kind, other = next((kind, path) for kind, path in first.items() if kind != "source")
        hint = ", or use --text-documents file" if kind == "text" else ""
        raise DataError(
            f"{first['source']} is a source file and {other} is not: got data of several kinds; expected one kind. "
            f"Capture each into its own cache, and train on both{hint}."
        )


def _expand(name: str | Path) -> Files:
    path = Path(name)
    if _URL.match(str(name)):
        whole = _URL.sub(r"\1://", str(name))  # Path makes one slash of two
        raise DataError(f"{whole}: got a URL; expected a file, a folder or a pattern. Download the data first.")
    if path.is_dir():
        found = _of_folder(path)
    elif path.exists() or not any(mark in str(name) for mark in "*?["):
        return Files([path], [])
    else:
        found = Files(
            sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))), []
        )
    if not found.paths:
        raise DataError(f"{name}: there are no files of {KNOWN}.")
    return found


def _of_folder(folder: Path) -> Files:
    """Of the files in it, those of one sort: Parquet, Arrow, JSON and text; else compressed files and CSV; else the
    source files in it and in the folders below. Sorted by name. DataError for source files beside text or JSON."""
    here = sorted(path for path in folder.iterdir() if kind_of(path) is not None)
    data = [path for path in here if kind_of(path) != "source"]
    if first := [path for path in data if path.suffix.lower() in _FIRST]:
        data = first
    source = [] if any(path.suffix.lower() not in _OF_REPOSITORIES for path in data) else _source_below(folder)
    if not data:
        return Files(source, [])
    if code := [path for path in source if path.suffix.lower() not in _OF_DATA_SETS]:
        raise DataError(
            f"{folder}: got data ({data[0].name}) and source files ({code[0].relative_to(folder)}); expected one kind. "
            f"Name those to read by a pattern: '{folder}/*{data[0].suffix}', or '{folder}/**/*{code[0].suffix}'."
        )
    return Files(data, [path for path in here if path not in data and path.suffix.lower() not in _OF_DATA_SETS])


def _source_below(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED]
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in SOURCE]
    return sorted(found)
