"""`Deployable`: a trained student as the formats take it, and `load_deployable`, which reads one from its folder."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..models.hf import load_causal_lm, probe_causal_lm
from ..models.hub import load_transformers, resolve
from ..models.lm_head import logits_of
from ..models.module import EXAMPLES, TEXT, logits_width, output_of, run_probe, state_sha256
from ..models.protocol import Logits
from ..models.trained import WEIGHTS, load_trained
from ..utils.atomic import read_sealed
from ..utils.factories import is_factory, made_by
from ..utils.hashing import file_sha256

TRAINED = "trained:"
_RUN = "run.json"


@dataclass(frozen=True, eq=False)
class Deployable:
    """A student in evaluation mode, in float32 on the CPU.

    model: of transformers, or any module that maps token ids `[B, L]` or examples `[B, ...]` to logits, an object with
    `logits`, or `Hidden`; `plain` is one that returns a tensor of logits. kind: "text" or "examples". vocab_size: V,
    the width of its logits. name: for messages. config: that of transformers, or None. folder: with its files, or None
    for a module that was given. tokenizer: the folder with its tokenizer, or None. example: an input batch of two rows,
    ids `[2, 16]` int64 or inputs `[2, ...]`. max_positions: the longest sequence that it takes; None: unknown, or none.
    factory: the module:factory that made it; None for one of transformers, or a module that was given.
    """

    model: nn.Module
    kind: Literal["text", "examples"]
    vocab_size: int
    name: str
    config: Any
    folder: Path | None
    tokenizer: Path | None
    example: Tensor
    max_positions: int | None
    factory: str | None = None

    @property
    def plain(self) -> nn.Module:
        """The model as a module from a tensor, ids `[B, L]` or inputs `[B, ...]`, to a tensor of logits `[B, L, V]` or
        `[B, V]`, without a KV cache. It shares the parameters."""
        return PlainLogits(self)

    @property
    def sha256(self) -> str:
        """Of its parameters and buffers."""
        return state_sha256(self.model)


class PlainLogits(nn.Module):
    """See `Deployable.plain`."""

    def __init__(self, deployable: Deployable) -> None:
        super().__init__()
        self.model = deployable.model
        self._shape = TEXT if deployable.kind == "text" else EXAMPLES

    def forward(self, inputs: Tensor) -> Tensor:
        return plain_logits(self.model, inputs, self._shape)


def plain_logits(model: nn.Module, inputs: Tensor, shape: str | None) -> Tensor:
    """The logits of a model for ids or examples, as a tensor. shape: `TEXT`, `EXAMPLES`, or None for either."""
    if hasattr(model, "get_output_embeddings"):
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits
    output = output_of(model(inputs), type(model).__name__, shape, ExportError)
    return output.values if isinstance(output, Logits) else logits_of(output.states, output.lm_head)


class Source(NamedTuple):
    """Where a student is. folder: its files. factory: what makes its module, None for one of transformers."""

    folder: Path
    factory: str | None = None


def load_deployable(source: Any, *, examples: Tensor | None = None, trust_remote_code: bool = False) -> Deployable:
    """A trained student.

    source: the folder RUN/student; or trained:module:factory@RUN/student for a module that is not of transformers, if
        its run does not know what made it; or a torch module.
    examples: inputs `[b, ...]` with b >= 1 of a classifier; None for text.
    Raises ExportError if there is none, its run is not finished, or its files are not whole; TeacherError for files
    that transformers cannot load.
    """
    if isinstance(source, nn.Module):
        source = copy.deepcopy(source)  # its mode and type are changed
        if hasattr(source, "get_output_embeddings") and examples is None:
            return _of_transformers(source, type(source).__name__, None)
        return _of_module(source, type(source).__name__, None, examples)
    folder, factory = find_student(str(source))
    if factory is None:
        if examples is not None:
            raise ExportError(f"{folder}: got a causal language model with examples; expected a classifier.")
        load_transformers()
        model = load_causal_lm(
            folder, resolve(folder), notes=[], dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        return _of_transformers(model, folder.resolve().name, folder)
    return _of_module(made_again(factory, folder), folder.resolve().name, folder, examples, factory)


def made_again(factory: str, folder: Path) -> nn.Module:
    """The module that module:factory makes, with the weights in a folder. Raises ExportError."""
    made = made_by(factory, ExportError)
    made = made() if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(made, nn.Module):
        raise ExportError(f"{factory}: returned {type(made).__name__}; expected a torch module.")
    return load_trained(made, folder, ExportError)


def find_student(source: str) -> Source:
    """The folder of a student, and what makes its module. ExportError if there is none, or it is not finished."""
    name, factory = source, ""
    if source.startswith(TRAINED):
        factory, _, name = source.removeprefix(TRAINED).partition("@")
        if not is_factory(factory) or not name:
            raise ExportError(f"student: got {source!r}; expected {TRAINED}module:factory@RUN/student.")
    folder = Path(name).expanduser()
    run = _run_of(folder)
    if not folder.is_dir():
        if run is not None:
            raise ExportError(
                f"{folder}: there is no such folder, as the run {folder.parent} is not finished. Run the same training "
                "again, and export the student then."
            )
        raise ExportError(f"{folder}: there is no such folder; expected that of a trained student, RUN/student.")
    if run is not None and not run.get("report", {}).get("complete", True):
        raise ExportError(
            f"{folder}: the run {folder.parent} is not finished. Run the same training again, and export the student "
            "then."
        )
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return Source(folder, factory or None)
    if (folder / _RUN).is_file() or (folder / "checkpoints").is_dir():
        raise ExportError(f"{folder}: got the folder of a run; expected that of its student, {folder / 'student'}.")
    if not (folder / WEIGHTS).is_file():
        raise ExportError(f"{folder}: got neither config.json nor {WEIGHTS}; expected the folder of a trained student.")
    given = (run or {}).get("student", {}).get("given")
    factory = factory or (given if given and is_factory(given) else "")
    if not factory:
        raise ExportError(
            f"{folder}: it does not say what made its module; expected {TRAINED}module:factory@{folder}, with the "
            "function that returns it."
        )
    return Source(folder, factory)


def weights_sha256(folder: Path) -> str:
    """sha256 of the files in a student's folder that decide what it answers: its weights and its config."""
    digest = hashlib.sha256()
    kinds = ("*.safetensors", "*.bin", "*.gguf", "config.json", "adapter_config.json")
    for path in sorted(path for kind in kinds for path in folder.glob(kind)):
        digest.update(f"{path.name}\0{file_sha256(path)[0]}\n".encode())
    return digest.hexdigest()


def _run_of(folder: Path) -> dict[str, Any] | None:
    """What run.json says of the run whose student is in a folder; None if there is none; {} if it cannot be read, or a
    run has only begun."""
    place = folder.parent
    try:
        found = read_sealed(place / _RUN)
    except FileNotFoundError:
        return {} if (place / "checkpoints").is_dir() or (place / "metrics.jsonl").is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_transformers(model: Any, name: str, folder: Path | None) -> Deployable:
    model = model.eval().float().cpu()
    probed = probe_causal_lm(model, name, [])
    tokenizer = folder if folder is not None and any(folder.glob("tokenizer*")) else None
    generator = torch.Generator().manual_seed(1)
    most = min(int(model.get_input_embeddings().weight.shape[0]), probed.vocab_size)
    example = torch.randint(0, most, (2, min(16, probed.max_positions or 16)), generator=generator)
    return Deployable(
        model, "text", probed.vocab_size, name, model.config, folder, tokenizer, example, probed.max_positions
    )


def _of_module(
    model: nn.Module, name: str, folder: Path | None, examples: Tensor | None, factory: str | None = None
) -> Deployable:
    model = model.eval().float().cpu()
    if examples is None:
        example = torch.arange(32).reshape(2, 16) % 4
    else:
        example = (examples if len(examples) > 1 else torch.cat([examples, examples]))[:2].cpu()
    with torch.no_grad():
        try:
            output = run_probe(model, example, name, TEXT if examples is None else EXAMPLES, ExportError)
        except ExportError as error:
            hint = " A classifier needs its examples: --data module:factory." if examples is None else ""
            raise ExportError(f"{error}{hint}") from error
    kind: Literal["text", "examples"] = "text" if examples is None else "examples"
    return Deployable(model, kind, logits_width(output), name, None, folder, None, example, None, factory)


def source_json(model: Deployable) -> dict[str, Any]:
    """What an exported folder says of its student."""
    if model.folder is None:
        return {"student": model.name, "sha256": model.sha256}
    return {"student": str(model.folder.resolve()), "sha256": weights_sha256(model.folder)}
