"""The fields of settings as keyword arguments: `fastkd.train(..., rate=1e-3)`. One TypedDict for each dataclass of
settings.py whose fields a function takes by name, so that type checkers and editors know them; a test compares them
with the dataclasses. Imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from .kernels.divergences import DivergenceName
from .kernels.treatment import TreatmentName
from .utils.similar import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)
else:
    Settings = TypeVar("Settings")


def changed(function: str, settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with other values of some fields. TypeError, which names the function, for what is no field."""
    check_names(function, changes, [field.name for field in fields(settings)])
    return replace(settings, **changes)


def check_names(function: str, changes: Mapping[str, Any], known: list[str]) -> None:
    """TypeError, which names the function, for a name that is not among the known ones."""
    if unknown := sorted(changes.keys() - set(known)):
        hints = "".join(did_you_mean(name, known) for name in unknown)
        raise TypeError(f"{function}() got unexpected settings: {', '.join(unknown)}.{hints}")


class TargetChanges(TypedDict, total=False):
    """Fields of `TargetSettings`."""

    k: int
    draws: int
    draw_temperature: float
    mass: float | None
    temperatures: tuple[float, ...]
    codec: Literal["fast", "default", "smallest", "portable"]


class WindowChanges(TypedDict, total=False):
    """Fields of `WindowSettings`."""

    context: int | None
    packing: Literal["pack", "keep"]
    on_long: Literal["split", "truncate", "error"]
    overlap: int
    held_out: float | None
    shard_positions: int | None


class FeatureChanges(TypedDict, total=False):
    """Fields of `FeatureSettings`."""

    feature_step: float | None
    feature_kl: float | None
    feature_positions: str
    feature_block: bool


class CaptureChanges(FeatureChanges, WindowChanges, TargetChanges, total=False):
    """Fields of `CaptureSettings`."""

    batch_tokens: int
    seed: int
    features: tuple[str, ...]


class ReadingChanges(TypedDict, total=False):
    """Fields of `ReadingSettings`."""

    column: str | None
    text_documents: Literal["line", "blank-line", "file"]
    template: Path | None
    loss_on: Literal["assistant", "all"]


class LiveChanges(ReadingChanges, FeatureChanges, WindowChanges, TargetChanges, total=False):
    """Fields of `LiveSettings`."""

    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"]
    teacher_attention: str | None
    teacher_revision: str | None
    teacher_options: tuple[str, ...]
    teacher_batch_tokens: int
    data_seed: int


class DeployChanges(TypedDict, total=False):
    """Fields of `DeploySettings`."""

    at_most: float | None
    positions: int | None
    threads: int | None
    allow_other_tokenizer: bool
    trust_remote_code: bool


class ExportChanges(DeployChanges, total=False):
    """Fields of `ExportSettings`."""

    quantize: Literal["none", "int8", "int4"]


class TrainChanges(TypedDict, total=False):
    """Fields of `TrainSettings`."""

    steps: int | None
    epochs: float
    batch_tokens: int | None
    batch_size: int | None
    micro_tokens: int
    layout: Literal["padded", "packed"]
    rate: float
    rate_schedule: Literal["cosine", "wsd", "linear", "constant"]
    rate_floor: float
    warmup: float
    decay: float
    alpha: float
    alpha_end: float | None
    alpha_schedule: Literal["linear", "cosine"]
    temperature: float
    temperature_end: float | None
    temperature_schedule: Literal["linear", "cosine"]
    divergence: DivergenceName
    treatment: TreatmentName
    beta: float
    skew: float
    match: tuple[str, ...]
    match_projector: Literal["linear", "identity"]
    match_init: Literal["least-squares", "random"]
    match_rate: float | None
    exits: tuple[int | str, ...]
    exit_weight: float
    exit_alpha: float
    lora_rank: int | None
    lora_alpha: float | None
    lora_targets: tuple[str, ...]
    lora_dropout: float
    lora_merge: bool
    quantize: Literal["none", "int8", "int4"]
    quantize_after: int | None
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_eps: float
    clip: float | None
    precision: Literal["auto", "float32", "bfloat16"]
    seed: int
    parallel: Literal["ddp", "fsdp"]
    activation_checkpointing: bool
    compile: bool
    device: str | None
    timeout_minutes: float
    evaluate_every: int | None
    evaluate_positions: int | None
    log: Literal["none", "tensorboard", "wandb"]
    best: str
    checkpoint_every: int | None
    checkpoint_minutes: float
    keep: int | None
    export: Literal["last", "best"]
    export_teacher: bool
    export_exit: int | None
    max_positions: int | None
    skip: int
    shards_open: int
    threads: int
    allow_partial: bool
    tokenizer: str | None
    allow_other_tokenizer: bool
    revision: str | None
    attention: str | None
    trust_remote_code: bool


class MutualChanges(LiveChanges, total=False):
    """Fields of `MutualSettings`."""

    teacher_k: int | None
    teacher_draws: int | None
    every: int
    one_each: bool


class MutualTrainChanges(MutualChanges, TrainChanges, total=False):
    """Fields of `MutualSettings` and of `TrainSettings`."""


class AttachChanges(TypedDict, total=False):
    """Fields of `LossConfig` and `TrainSettings` that say what the loss is, and how it changes."""

    alpha: float
    temperature: float
    divergence: DivergenceName
    treatment: TreatmentName
    beta: float
    skew: float
    alpha_end: float | None
    alpha_schedule: Literal["linear", "cosine"]
    temperature_end: float | None
    temperature_schedule: Literal["linear", "cosine"]
