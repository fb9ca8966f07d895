"""From `CaptureSettings` to the settings of each part of a capture: window plan, top-k config, cache spec. Imports
nothing heavy, so that the command line can check settings before it loads a teacher."""

from dataclasses import dataclass
from typing import Any

from ..cache.spec import CacheSpec
from ..errors import DataError, TeacherError
from ..settings import CaptureSettings

DEFAULT_CONTEXT = 2048
_SAME_NAME = ("k", "draws", "draw_temperature", "mass", "temperatures", "codec")  # in CaptureSettings and CacheSpec


@dataclass(frozen=True)
class WindowPlanSettings:
    """How documents are divided into windows, shards and batches.

    context: positions per window, at most. packing: "pack" or "keep".
    on_long: for documents longer than the context: "split" them into segments; "truncate" them to their first `context`
        tokens; or raise an "error".
    overlap: with "split", tokens before a segment that are repeated at its start as context, without a target.
    shard_positions: positions per shard, at most. batch_tokens: positions per teacher batch, padding included, at most;
        a longer segment is a batch by itself.
    held_out: the fraction of the documents that is held out (rounded; at least one document unless it is 0).
    seed: decides which documents are held out.
    """

    context: int
    packing: str = "pack"
    on_long: str = "split"
    overlap: int = 0
    shard_positions: int = 2**20
    batch_tokens: int = 8192
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("context", 1, 2**31 - 1),
            ("overlap", 0, 2**31 - 1),
            ("shard_positions", 1, 2**31 - 1),
            ("batch_tokens", 1, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= int(value) <= high:
                raise DataError(f"{name}: got {value!r}; expected an integer from {low} to {high}.")
            object.__setattr__(self, name, int(value))
        for name, choices in (("packing", ("pack", "keep")), ("on_long", ("split", "truncate", "error"))):
            if getattr(self, name) not in choices:
                raise DataError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(choices)}.")
        if self.overlap and (self.on_long != "split" or self.overlap >= self.context):
            raise DataError(
                f'overlap: got {self.overlap}; expected less than the context ({self.context}), with on_long="split".'
            )
        if self.shard_positions < self.context:
            raise DataError(
                f"shard_positions: got {self.shard_positions}; expected at least the context ({self.context})."
            )
        held_out = self.held_out
        if isinstance(held_out, (bool, str)) or not hasattr(held_out, "__float__") or not 0 <= float(held_out) < 1:
            raise DataError(f"held_out: got {held_out!r}; expected a fraction from 0 to below 1.")
        object.__setattr__(self, "held_out", float(held_out) + 0.0)


def window_plan_settings(
    settings: CaptureSettings, *, documents: int, tokens: int, longest: int | None = None, copies: int | None = None
) -> WindowPlanSettings:
    """The settings of the window plan, with defaults filled in.

    documents: those that are not empty. tokens: in all of them. longest: tokens that the teacher takes; None: no limit.
    copies: of each example, for a dataset of examples; None for text.
    Raises DataError and TeacherError.
    """
    held_out = settings.held_out if settings.held_out is not None else 0.01 * (documents > 1)
    shard_positions = settings.shard_positions
    if shard_positions is None:
        shard_positions = min(max(-(-tokens // 64), 2**14), 2**20)
    common: dict[str, Any] = {"batch_tokens": settings.batch_tokens, "held_out": held_out, "seed": settings.seed}
    if copies is not None:
        return WindowPlanSettings(copies, "keep", shard_positions=max(shard_positions, copies), **common)
    context = settings.context
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    elif longest is not None and context > longest:
        raise TeacherError(f"context: got {context}; expected at most {longest}, the limit of this teacher.")
    return WindowPlanSettings(
        context=context,
        packing=settings.packing,
        on_long=settings.on_long,
        overlap=settings.overlap,
        shard_positions=max(shard_positions, context) if settings.shard_positions is None else shard_positions,
        **common,
    )


def cache_spec(settings: CaptureSettings, *, vocab_size: int, **rest: Any) -> CacheSpec:
    """The spec of a cache with these settings. rest: other fields of `CacheSpec`. Raises CacheError."""
    return CacheSpec(vocab_size=vocab_size, **{name: getattr(settings, name) for name in _SAME_NAME}, **rest)


def check_settings(settings: CaptureSettings) -> None:
    """CacheError or DataError for settings that are invalid for every teacher and dataset."""
    cache_spec(settings, vocab_size=2**26)
    # without a context, the teacher's limit decides it: it may be as small as a shard
    longest = settings.shard_positions if settings.context is None else None
    window_plan_settings(settings, documents=2, tokens=2**26, longest=longest)
