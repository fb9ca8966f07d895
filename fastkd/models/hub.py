"""Where models and tokenizers lie: a folder, a GGUF file, or a name on the Hugging Face Hub. And transformers itself.

Needs the extra `hf`, which is imported here and nowhere else.
"""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import kernels
from ..errors import TeacherError

INSTALL = "pip install 'fastkd[hf]'"
# What a model is loaded from; not the same weights again in another format, nor what lies in folders beside them.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]
_PICKLED = ["*.bin"]
_UNWANTED = ["*/*", "consolidated*", "training_args*"]
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Place:
    """A model's folder; gguf: the file in it that is the model, where it is one. name: for people."""

    folder: Path
    name: str
    gguf: str | None = None

    @property
    def path(self) -> Path:
        """The folder, or the file."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def arguments(self) -> dict[str, str]:
        """What `from_pretrained(folder, ...)` has to be told."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def resolve(place: str | Path, revision: str | None = None) -> Place:
    """Where a folder, a GGUF file or a name on the Hub lies on this machine; of the Hub, whatever is missing is
    fetched first.

    place: what exists here is taken as such, before it is a name. "owner/name/file.gguf" names a file on the Hub.
    revision: of a name on the Hub: a branch, a tag or a commit.
    Raises TeacherError where there is nothing of the kind.
    """
    path = Path(place).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise TeacherError(
                f"{place}: a file that is no .gguf; a model is such a file, a folder, or a name on the Hub."
            )
        return Place(path.parent, path.stem, path.name)
    if path.is_dir():
        if not (path / "config.json").exists() and (found := sorted(path.glob("*.gguf"))):
            raise TeacherError(f"{place}: a folder of GGUF files. Name one of them: {', '.join(map(str, found[:9]))}.")
        return Place(path, path.resolve().name)
    name, _, file = str(place).rpartition("/") if str(place).endswith(".gguf") else (str(place), "", "")
    if isinstance(place, Path) or not _NAME.fullmatch(name):
        raise TeacherError(f"{place}: there is no such file or folder.")
    folder = _snapshot(name, revision, [file] if file else _WANTED)
    if not file and not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, revision, _WANTED + _PICKLED)
    if file and not (folder / file).exists():
        raise TeacherError(f"{place}: there is no file {file} in {name} on the Hugging Face Hub.")
    return Place(folder, Path(file).stem or name.rpartition("/")[2], file or None)


def _snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder of a Hub repository's files in the Hub's own cache on this machine."""
    load_transformers()
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        )
    except Exception as error:  # of the name, the Hub, the network, a proxy, the disk: each library has its own
        asked = f"{name} at revision {revision}" if revision else name
        if isinstance(error, RevisionNotFoundError):
            why = "the Hugging Face Hub has it, but not that revision"
        elif isinstance(error, LocalEntryNotFoundError) and huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "not in the Hub's cache on this machine, and HF_HUB_OFFLINE forbids to fetch it"
        else:
            why = brief(error)
        raise TeacherError(
            f"{asked}: no file or folder here, and not to be had from the Hugging Face Hub ({why}). Check the name, "
            f"log in if it is gated (`hf auth login`), or fetch it where there is a network (`hf download {name}`)."
        ) from error


def brief(error: BaseException, limit: int = 160) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + '…'}"


def load_transformers() -> Any:
    """The package transformers, importable where we stand, without bars of its own, but for one of GGUF files at a
    terminal. TeacherError where it is not."""
    # it asks for a package named kernels, and in the root of this repository finds the folder of ours
    spec = importlib.util.find_spec("kernels") if "kernels" not in sys.modules else None
    if spec is not None and spec.origin == kernels.__file__:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import accelerate  # noqa: F401  transformers asks for it, late
        import transformers
    except ImportError as error:
        raise TeacherError(f"the teacher: {error}. Use `{INSTALL}`.") from error
    transformers.utils.logging.disable_progress_bar()
    # of its bars this one does not hear of that; at a terminal it is welcome, as it takes a while
    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    loader.tqdm = partial(tqdm, disable=None)
    return transformers
