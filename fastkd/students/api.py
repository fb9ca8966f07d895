"""`student(...)`: a folder with a student that is made from a teacher to fit a budget."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cache import Cache, open_cache
from ..errors import TrainError
from ..models.adapters import adapter_files
from ..models.axes import ModelAxes, Shape, read_axes
from ..models.hf import load_causal_lm
from ..models.hub import ModelFiles, brief, load_transformers, resolve
from ..models.module import parameters_and_bytes
from ..models.prune import prune, resized_config
from ..models.pruned import keep_layers, kept_layers
from ..models.quantization import SCHEMES, problem_of
from ..models.taps import layers_of
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..settings import StudentSettings
from ..train.student import Student, check_fits, of_transformers
from ..utils.atomic import check_place, write_folder
from ..utils.progress import Mode
from .budget import Budget, Sizes, read_budget
from .choose import choose, logits_of, teacher_on
from .importance import Tally
from .result import NEW, PRUNED, Candidate, StudentReport
from .sample import kl_on, read_sample
from .shapes import Grid, candidates, grid_of, scaled

DEFAULTS = StudentSettings()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def student(
    teacher: str | Path,
    out: Path | str,
    settings: StudentSettings = DEFAULTS,
    *,
    cache: Any = None,
    progress: Mode = "none",
) -> StudentReport:
    """Write the folder of a student that is made from a teacher.

    teacher: a folder, a GGUF file or a Hub name of a causal language model, or of an adapter.
    With `at_most` and a cache of this teacher (a `Cache`, or what `open_cache` takes): a copy of the teacher without
    what matters least, see `choose.py`. Without a cache: a config of this size (of new weights), and the tokenizer.
    With `drop_every`: a copy without one layer in so many.

    Raises TrainError, TeacherError, StreamError and CacheError before anything is written: for a size that is not
    possible, a teacher whose parts are not known, a cache of another teacher, and a folder that exists.
    """
    out = Path(out)
    budget = _check(settings, out)
    # without a cache, nothing is run
    device = settings.device or ("cuda" if torch.cuda.is_available() and cache is not None else "cpu")
    opened = None if cache is None else cache if isinstance(cache, Cache) else open_cache(cache)
    if opened is not None and "tokens" not in opened.spec.inputs:
        raise TrainError(f"cache: got {opened!r}, which is of examples; expected one of text.")
    files = resolve(teacher, settings.revision)
    loading = _Loading(teacher, files, settings, torch.device(device))
    if budget is None:
        return _dropped(loading, opened, out, settings, progress)
    skeleton = loading.skeleton()
    axes = read_axes(skeleton)
    sizes = Sizes(skeleton, axes, budget)
    grid = _grid(skeleton, axes, budget, sizes)
    if opened is None:
        return _new(skeleton.config, loading, axes, grid, sizes, out)
    shapes = candidates(axes, grid, sizes.fits)
    tokenizer, model = loading.tokenizer(), loading.model()
    whole = _as_student(model, files.name, tokenizer, opened, settings)
    sample = read_sample(
        opened, settings.positions, seed=settings.seed, device=model.device, allow_partial=settings.allow_partial
    )  # fmt: skip
    with Tally(model, axes) as tally:
        kl = teacher_on(whole, opened, sample, progress, tally)
    found = choose(whole, axes, tally.importance(), shapes, sample, progress)
    made = prune(model, axes, found.kept)
    report = _write(out, made, tokenizer, loading, settings)
    return StudentReport(
        **report, teacher=axes.parameters(axes.shape), layers=found.kept.layers, order=found.order,
        kl_after=found.kl_after, candidates=found.candidates, teacher_kl=kl, notes=loading.notes,
    )  # fmt: skip


def _check(settings: StudentSettings, out: Path) -> Budget | None:
    """The budget, or None with drop_every. Raises TrainError for settings that contradict each other."""
    if out.exists():
        raise TrainError(f"out: got {str(out)!r}, which exists; expected a new folder.")
    check_place(out, "out", TrainError)
    if (settings.at_most is None) == (settings.drop_every is None):
        got = "neither" if settings.at_most is None else "both"
        raise TrainError(f"at_most, drop_every: got {got}; expected one of them.")
    if settings.positions < 1:
        raise TrainError(f"positions: got {settings.positions}; expected at least one.")
    if settings.at_most is not None:
        return read_budget(settings.at_most, dtype=settings.dtype, quantize=settings.quantize)
    if settings.quantize != "none":
        raise TrainError(
            f"quantize: got {settings.quantize!r} with drop_every; expected at_most, whose bytes it is for."
        )
    return None


class _Loading:
    """A teacher that is loaded in parts. notes: for the user, a line each."""

    def __init__(self, name: str | Path, files: ModelFiles, settings: StudentSettings, device: torch.device) -> None:
        self.files, self.notes = files, list[str]()
        self._name, self._settings, self._device = name, settings, device
        self._loaded: Any = None

    def model(self) -> Any:
        """In float32 on a CPU, in the type of the settings on a GPU; in evaluation mode."""
        if self._loaded is None:
            dtype = torch.float32 if self._device.type == "cpu" else _DTYPES[self._settings.dtype]
            options: dict[str, Any] = {"trust_remote_code": self._settings.trust_remote_code, "dtype": dtype}
            model = load_causal_lm(self._name, self.files, notes=self.notes, **options)
            self._loaded = model.eval().requires_grad_(False).to(self._device)
        return self._loaded

    def skeleton(self) -> Any:
        """The model with meta tensors, where its folder has a config; otherwise itself."""
        if self.files.gguf or adapter_files(self.files) is not None:
            return self.model()
        transformers, remote = load_transformers(), self._settings.trust_remote_code
        try:
            config = transformers.AutoConfig.from_pretrained(self.files.folder, trust_remote_code=remote)
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
        except Exception as error:
            raise TrainError(
                f"teacher: transformers cannot make a causal language model of {self._name} ({brief(error)})."
            ) from error

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the settings; otherwise the teacher's own, if it has one."""
        remote = self._settings.trust_remote_code
        if self._settings.tokenizer is not None:
            return load_tokenizer(self._settings.tokenizer, trust_remote_code=remote)
        adapter = adapter_files(self.files)
        for one in [self.files] if adapter is None else [self.files, adapter.base_files]:
            if one.gguf or any(one.folder.glob("tokenizer*")):
                return load_tokenizer(one.path, trust_remote_code=remote)
        return None


def _grid(skeleton: Any, axes: ModelAxes, budget: Budget, sizes: Sizes) -> Grid:
    """The sizes that shapes may have. Raises TrainError for a budget that is too small or too large for them."""
    scheme = SCHEMES.get(budget.quantize)
    if scheme is not None and (problem := problem_of(skeleton, scheme)):
        raise TrainError(f"quantize: {problem}.")
    grid = grid_of(axes, None if scheme is None else scheme.linear.group)
    if sizes.fits(axes.shape):
        raise TrainError(
            f"at_most: got {budget.text}; expected less than the teacher's {budget.show(sizes.of(axes.shape))}. Use "
            "the teacher itself as the student."
        )
    if not sizes.fits(grid.smallest):
        raise TrainError(
            f"at_most: got {budget.text}; expected at least {budget.show(sizes.of(grid.smallest))}, which the smallest "
            f"student with the teacher's vocabulary and heads has ({grid.smallest.text})."
        )
    return grid


def _as_student(model: Any, name: str, tokenizer: Tokenizer | None, cache: Cache, settings: StudentSettings) -> Student:
    """The teacher, to be run. Raises TrainError if it does not fit the cache."""
    found = of_transformers(model, name)
    if found.vocab_size != cache.spec.vocab_size:
        raise TrainError(
            f"cache: got {cache!r} with a vocabulary of {cache.spec.vocab_size}; expected {found.vocab_size}, as "
            f"{name} has."
        )
    check_fits(found, tokenizer, cache.spec, allow_other_tokenizer=settings.allow_other_tokenizer)
    return found


def _dropped(
    loading: _Loading, cache: Cache | None, out: Path, settings: StudentSettings, progress: Mode
) -> StudentReport:
    """A copy without one layer in `drop_every`; with a cache, its KL divergence is measured."""
    every, tokenizer, model = settings.drop_every or 0, loading.tokenizer(), loading.model()
    whole, count = parameters_and_bytes(model)[0], len(layers_of(model))
    if every < 2 or len(kept := kept_layers(count, every)) == count:
        raise TrainError(
            f"drop_every: got {every}; expected 2 or more, such that one of {loading.files.name}'s {count} layers is "
            "removed."
        )
    teacher_kl, found = None, []
    if cache is not None:
        run = _as_student(model, loading.files.name, tokenizer, cache, settings)
        sample = read_sample(
            cache, settings.positions, seed=settings.seed, device=model.device, allow_partial=settings.allow_partial
        )  # fmt: skip
        teacher_kl = teacher_on(run, cache, sample, progress)
    try:
        keep_layers(model, kept)
    except ValueError as error:
        raise TrainError(f"teacher: {error} (an nn.ModuleList of one class) to remove some of.") from error
    if cache is not None:
        kl = kl_on(sample, logits_of(of_transformers(model, loading.files.name)))
        config = model.config.get_text_config()
        shape = Shape(
            len(kept), config.hidden_size, getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            getattr(config, "intermediate_size", 0),
        )  # fmt: skip
        found = [Candidate(shape, parameters_and_bytes(model)[0], kl, sample.counted)]
    report = _write(out, model, tokenizer, loading, settings)
    return StudentReport(
        **report, teacher=whole, layers=tuple(kept), candidates=found, teacher_kl=teacher_kl, notes=loading.notes
    )


def _new(config: Any, loading: _Loading, axes: ModelAxes, grid: Grid, sizes: Sizes, out: Path) -> StudentReport:
    """A config of about the teacher's proportions, without weights."""
    shape = scaled(axes, grid, sizes.fits) or grid.smallest
    made, tokenizer = resized_config(config, axes, shape), loading.tokenizer()

    def fill(folder: Path) -> None:
        made.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save(folder)

    write_folder(out, fill)
    return StudentReport(
        out, NEW, axes.parameters(shape), sizes.bytes(shape), axes.parameters(axes.shape),
        candidates=[Candidate(shape, axes.parameters(shape))], notes=loading.notes,
    )  # fmt: skip


class _Written(NamedTuple):
    folder: Path
    kind: str
    parameters: int
    bytes: int


def _write(
    out: Path, model: Any, tokenizer: Tokenizer | None, loading: _Loading, settings: StudentSettings
) -> dict[str, Any]:
    """Write a copy of the teacher: weights, config, tokenizer and licenses. Returns the beginning of its report."""
    model = model.to("cpu", _DTYPES[settings.dtype])

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save(folder)
        for path in loading.files.kept:  # licenses; the model has written its generation config
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)

    write_folder(out, fill)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return _Written(out, PRUNED, parameters_and_bytes(model)[0], size)._asdict()
