"""The files of models and tokenizers: a folder, a GGUF file, or a name on the Hugging Face Hub.

The extra `hf` is imported here and nowhere else.
"""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import kernels
from ..cache.errors import said
from ..errors import TeacherError
from ..utils.similar import similar_path
from .torchao import drop_noise

INSTALL = "pip install 'fastkd[hf]'"
# The files to download; not the same weights in another format, nor subfolders.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "README.md"]
LICENSES = ["LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"]
"""Files of a model that go with every copy of it."""
_PICKLED = ["*.bin"]
_UNWANTED = ["*/*", "consolidated*", "training_args*"]
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, its name for messages, and for a GGUF model the name of the file in the folder. hub: the id of
    its repository on the Hub, if it was named by that."""

    folder: Path
    name: str
    gguf: str | None = None
    hub: str | None = None

    @property
    def path(self) -> Path:
        """The folder, or the file."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def arguments(self) -> dict[str, str]:
        """Keyword arguments for `from_pretrained(folder, ...)`."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    @property
    def kept(self) -> list[Path]:
        """Its files that a model made from it has as well: licenses, and the generation config."""
        found = [path for pattern in LICENSES for path in sorted(self.folder.glob(pattern)) if path.is_file()]
        config = self.folder / "generation_config.json"
        return found + ([config] if config.is_file() and not self.gguf else [])

    @cached_property
    def license(self) -> dict[str, str]:
        """license, license_name and license_link in the metadata of its card (README.md), those that are there."""
        card = self.folder / "README.md"
        if not card.is_file():
            return {}
        from huggingface_hub import metadata_load

        try:
            found = metadata_load(card)
        except Exception:  # a card that cannot be read says nothing of a license
            return {}
        names = ("license", "license_name", "license_link")
        return {n: str(found[n])[:200] for n in names if found and isinstance(found.get(n), str) and found[n]}


def resolve(source: str | Path, revision: str | None = None) -> ModelFiles:
    """The local files of a folder, a GGUF file or a name on the Hub; missing files are downloaded from the Hub first.

    source: an existing path takes precedence over a Hub name. "owner/name/file.gguf" names a file on the Hub.
    revision: of a Hub name: a branch, a tag or a commit.
    Raises TeacherError if there is nothing under that name.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise TeacherError(
                f"{source}: got another kind of file; expected a .gguf file, a folder, or a name on the Hub."
            )
        return ModelFiles(path.parent, path.stem, path.name)
    if path.is_dir():
        if not (path / "config.json").exists() and (found := sorted(path.glob("*.gguf"))):
            raise TeacherError(f"{source}: a folder of GGUF files. Name one of them: {', '.join(map(str, found[:9]))}.")
        return ModelFiles(path, path.resolve().name, hub=_repository_of(path.resolve()))
    name, _, file = str(source).rpartition("/") if str(source).endswith(".gguf") else (str(source), "", "")
    if isinstance(source, Path) or not _NAME.fullmatch(name) or name.startswith("."):
        raise TeacherError(f"{source}: there is no such file or folder.{_beside(source)}")
    folder = _snapshot(name, revision, [file] if file else _WANTED + LICENSES)
    if not file and not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, revision, _WANTED + LICENSES + _PICKLED)
    if file and not (folder / file).exists():
        raise TeacherError(f"{source}: there is no file {file} in {name} on the Hugging Face Hub.")
    return ModelFiles(folder, Path(file).stem or name.rpartition("/")[2], file or None, name)


def _beside(source: str | Path) -> str:
    """The question whether what is beside a path that does not exist was meant."""
    found = similar_path(str(source))
    return f" Did you mean {found}?" if found else ""


def _repository_of(folder: Path) -> str | None:
    """The id of the repository that a folder of the Hub's own cache is a snapshot of; None for any other folder."""
    found = re.search(r"/models--(?:([^/]+?)--)?([^/]+)/snapshots/[^/]+$", folder.as_posix())
    return "/".join(part for part in found.groups() if part) if found else None


def _snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder of a Hub repository in the local Hub cache, files downloaded if missing."""
    load_transformers()
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        )
    except Exception as error:  # name, Hub, network, proxy, disk: each library raises its own
        requested = f"{name} at revision {revision}" if revision else name
        if isinstance(error, RevisionNotFoundError):
            why = "it exists there, but not that revision"
        elif isinstance(error, LocalEntryNotFoundError) and huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "it is not in the local cache, and HF_HUB_OFFLINE forbids downloads"
        elif isinstance(error, LocalEntryNotFoundError):
            why = "it is not in the local cache, and the Hub cannot be reached"
        else:
            why = brief(error)
        raise TeacherError(
            f"{requested}: no file or folder here, and cannot be downloaded from the Hugging Face Hub ({why})."
            + (
                _beside(name)
                or " Check the name, log in if it is gated (`hf auth login`), or download it elsewhere (`hf download "
                f"{name}`)."
            )
        ) from error


def brief(error: BaseException, limit: int = 160) -> str:
    """A library's error in one line."""
    text = said(error) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + '…'}"


def load_transformers() -> Any:
    """The package transformers, without its progress bars except the one for GGUF files at a terminal. TeacherError if
    the extra is not installed."""
    # transformers looks for a package named kernels; in the root of this repository it would find our folder
    spec = importlib.util.find_spec("kernels") if "kernels" not in sys.modules else None
    if spec is not None and spec.origin == kernels.__file__:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    drop_noise()
    try:
        import accelerate  # noqa: F401  transformers imports it late
        import transformers
    except ImportError as error:
        raise TeacherError(f"transformers and accelerate are needed here: {said(error)}. Use `{INSTALL}`.") from error
    transformers.utils.logging.disable_progress_bar()
    # reading GGUF files takes a while, and ignores disable_progress_bar
    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    loader.tqdm = partial(tqdm, disable=None, leave=False)
    return transformers
