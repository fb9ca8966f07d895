"""How large the demo is: for two cores, or for a GPU; each size may be set by itself."""

from dataclasses import dataclass, fields, replace

from ..settings import DemoSettings


@dataclass(frozen=True)
class Sizes:
    """Windows and steps; see `DemoSettings`."""

    window: int
    train_windows: int
    held_out: int
    shard_windows: int
    batch_windows: int
    steps: int

    @property
    def windows(self) -> int:
        """All of them."""
        return self.train_windows + self.held_out

    @property
    def step_positions(self) -> int:
        """Positions a step."""
        return self.batch_windows * self.window


SIZES = {
    "cpu": Sizes(window=256, train_windows=16, held_out=48, shard_windows=48, batch_windows=2, steps=24),
    # 4.5 million positions
    "gpu": Sizes(window=1024, train_windows=4096, held_out=256, shard_windows=64, batch_windows=16, steps=512),
}


def sizes_of(settings: DemoSettings) -> Sizes:
    """The scale's, but for those that are set."""
    given = {f.name: value for f in fields(Sizes) if (value := getattr(settings, f.name)) is not None}
    return replace(SIZES[settings.scale], **given)
