"""What an export has written: its settings and finished shards, in one JSON file in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..utils.atomic import check_place, read_sealed, write_json

NAME = "fastkd-export.json"


def check_folder(folder: Path) -> None:
    """Raise ExportError for a folder with other files and no ledger, and one that cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"out: got {folder}, which is a file; expected a folder.")
    check_place(folder, "out", ExportError)
    names = [path.name for path in sorted(folder.iterdir()) if path.name[0] != "."] if folder.is_dir() else []
    if names and NAME not in names:
        raise ExportError(f"{folder}: got {names[0]!r}; expected an empty folder, a new one, or that of an export.")


class Ledger:
    """The file in a folder. settings: all that decides the bytes of the export. samples: of each finished shard.

    Raises ExportError for a folder with other files and no ledger, and for one that other settings wrote.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / NAME
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.samples: dict[int, int] = {}
        if self._path.exists():
            self._read()
            return
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def finish_shard(self, shard: int, samples: int) -> None:
        """Record a shard whose files are all written."""
        self.samples[shard] = samples
        self._write()

    def _read(self) -> None:
        try:
            found = read_sealed(self._path)
            before, samples = found["settings"], {int(shard): int(n) for shard, n in found["samples"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{self._path}: it is damaged ({error}). Export into a new folder.") from error
        differ = [
            f"{name} {before.get(name)!r}, now {value!r}"
            for name, value in self._settings.items()
            if before.get(name) != value
        ]
        if differ:
            raise ExportError(
                f"{self._path.parent}: it was exported with {'; '.join(differ)}. Use the same settings to resume, or "
                "another folder."
            )
        self.samples = samples

    def _write(self) -> None:
        samples = {str(shard): n for shard, n in sorted(self.samples.items())}
        write_json(self._path, {"settings": self._settings, "samples": samples})
