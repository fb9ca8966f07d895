"""What is asked of a capture, checked before anything is loaded. Imports nothing heavy."""

from ..cache.spec import CacheSpec
from ..settings import CaptureSettings
from .window_plan import PlanSettings


def check_asked(settings: CaptureSettings) -> None:
    """CacheError or DataError where these are settings that no capture can have, whatever its teacher and data."""
    CacheSpec(
        vocab_size=2**26,
        k=settings.k,
        draws=settings.draws,
        draw_temperature=settings.draw_temperature,
        mass=settings.mass,
        temperatures=settings.temperatures,
        codec=settings.codec,
    )
    shard_positions = settings.shard_positions
    if shard_positions is None:
        shard_positions = max(2**20, settings.context or 1)
    PlanSettings(
        # the teacher may take less than the default
        context=min(2048, shard_positions) if settings.context is None else settings.context,
        packing=settings.packing,
        on_long=settings.on_long,
        overlap=0 if settings.context is None else settings.overlap,
        shard_positions=shard_positions,
        batch_tokens=settings.batch_tokens,
        held_out=settings.held_out or 0.0,
        seed=settings.seed,
    )
