"""An exported folder: its files, and fastkd_export.json, which says what they are."""

import hashlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ExportError
from ..models.hub import LICENSES, brief
from ..utils.atomic import read_sealed, write_folder, write_json
from .calibration import Calibration
from .formats import Format, find
from .model import Deployable, source_json
from .runtime import Runtime

FILE = "fastkd_export.json"
VERSION = 1
_FORMAT = "fastkd-export"
# what tokenizers of transformers are made of, and the configs beside a model's weights
_BESIDE = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "chat_template*", *LICENSES,
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What fastkd_export.json says. folder: where it is. quantize, kind, vocab_size, max_positions: see `Deployable`
    and `Format`. source: the student, and a sha256 of its weights. written: what the format's `load` needs. files: the
    sha256 of each file of the format, by name. bytes: their size. versions: of the packages that wrote them."""

    folder: Path
    to: str
    quantize: str
    kind: str
    vocab_size: int
    max_positions: int | None
    source: Mapping[str, str]
    written: Mapping[str, Any]
    files: Mapping[str, str]
    bytes: int
    versions: Mapping[str, str]

    @property
    def name(self) -> str:
        """ "onnx int8"; of unquantised weights, "onnx"."""
        return self.to if self.quantize == "none" else f"{self.to} {self.quantize}"

    def runtime(self, threads: int) -> Runtime:
        """The files in the format's runtime. Raises ExportError."""
        return find(self.to).load(self.folder, dict(self.written), threads)

    def check_source(self, student: Mapping[str, str], factory: str | None) -> None:
        """Raise ExportError unless it was made from a student (`source_json`), and names no function but the one that
        made the student: a folder of somebody else must not choose what is called."""
        if self.source.get("sha256") != student["sha256"]:
            raise ExportError(
                f"{self.folder}: got an export of {self.source.get('student')} (sha256 "
                f"{str(self.source.get('sha256'))[:12]}…); expected one of {student['student']} (sha256 "
                f"{student['sha256'][:12]}…), with the weights that it has now. Export it again."
            )
        if (named := self.written.get("factory")) is not None and named != factory:
            expected = "none, as of a model of transformers" if factory is None else factory
            raise ExportError(
                f"{self.folder}: got {named!r} as the function that makes its module; expected {expected}."
            )


def write_exported(
    model: Deployable, folder: Path, to: str, found: Format, quantize: str, calibration: Calibration | None
) -> tuple[Exported, list[str]]:
    """Write a model in a format into a new folder, which is there whole or not at all. Returns it, and the format's
    notes. Raises ExportError."""
    notes: list[str] = []

    def fill(temporary: Path) -> None:
        try:
            written = dict(found.write(model, temporary, quantize, calibration))
        except (ExportError, OSError):
            raise
        except Exception as error:  # exporters raise all kinds, with pages of text
            raise ExportError(
                f"{model.name}: the format {to} cannot write {type(model.model).__name__} ({brief(error)}). Nothing "
                "was written. Choose another format."
            ) from error
        notes.extend(written.pop("notes", []))
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        record = Exported(
            folder, to, quantize, model.kind, model.vocab_size, model.max_positions, source_json(model), written,
            {path.relative_to(temporary).as_posix(): _sha256(path) for path in paths},
            sum(path.stat().st_size for path in paths), _versions(found),
        )  # fmt: skip
        _copy_beside(model.folder, temporary)
        document = {name: value for name, value in asdict(record).items() if name != "folder"}
        write_json(temporary / FILE, {"format": _FORMAT, "version": VERSION, **document})

    write_folder(folder, fill)
    return read_exported(folder), notes


def read_exported(folder: str | Path) -> Exported:
    """An exported folder whose files are as they were written. ExportError if it is none, or damaged."""
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise ExportError(f"{folder}: got no {FILE}; expected a folder that `fastkd export` wrote.")
    try:
        found = dict(read_sealed(folder / FILE))
        if (given := (found.pop("format"), found.pop("version"))) != (_FORMAT, VERSION):
            raise ExportError(f"{folder / FILE}: got {given[0]!r}, version {given[1]!r}; expected {VERSION}.")
        exported = Exported(folder, **found)
        _check(exported)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(f"{folder / FILE}: damaged ({error}). Export the student again.") from error
    for name, sha256 in exported.files.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != sha256:
            what = "has changed since it was written" if path.is_file() else "is missing"
            raise ExportError(f"{folder}: damaged: {name} {what}. Export the student again.")
    return exported


def _check(found: Exported) -> None:
    """ValueError for a document that `write_exported` cannot have written, such as one with files of other folders."""
    kinds = {"to": str, "quantize": str, "kind": str, "vocab_size": int, "bytes": int, "source": dict, "written": dict,
             "files": dict, "versions": dict}  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(value := getattr(found, name), kind):
            raise ValueError(f"{name}: got {value!r}; expected {kind.__name__}")
    if found.kind not in ("text", "examples"):
        raise ValueError(f"kind: got {found.kind!r}; expected text or examples")
    if not (found.max_positions is None or (isinstance(found.max_positions, int) and found.max_positions > 0)):
        raise ValueError(f"max_positions: got {found.max_positions!r}; expected a number from 1 on, or null")
    if found.vocab_size < 1:
        raise ValueError(f"vocab_size: got {found.vocab_size}; expected a number from 1 on")
    if outside := [name for name in found.files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"files: got {outside[0]!r}; expected names in the folder")
    # what a format's `load` opens: only files whose sha256 is known
    opened = [found.written["file"]] if "file" in found.written else list(found.written.get("files", []))
    if unknown := [name for name in opened if name not in found.files]:
        raise ValueError(f"written: got {unknown[0]!r}; expected one of its files")


def _copy_beside(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer, configs and licenses of a student, unless the format has written files of these names."""
    paths: Sequence[Path] = () if source is None else [path for kind in _BESIDE for path in source.glob(kind)]
    for path in paths:
        if path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _versions(found: Format) -> dict[str, str]:
    versions = {"fastkd": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", *found.PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _sha256(path: Path) -> str:
    """Of the bytes as they are now: `file_sha256` may recall its earlier answer for a file that was damaged since."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
