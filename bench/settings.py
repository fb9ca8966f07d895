"""Settings of `fastkd bench`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and what to do with it."""

    suites: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SUITE ...]")] = ()
    """Suites to run; --list shows them. Default: all except sass."""
    list: bool = False
    """List the suites and what they measure, without running them."""
    device: str | None = None
    """Device: cpu or cuda. Default: a GPU if there is one."""
    peers: bool = False
    """Also measure torch's fused head, Liger-Kernel, QuACK and Cut Cross-Entropy (pip install 'fastkd[peers]')."""
    full: bool = False
    """Use the published sizes: up to an hour instead of minutes."""
    rounds: int | None = None
    """Rounds per measurement. Default: set by each suite."""
    runs: int = 1
    """Repetitions of each suite; --check estimates the noise from two or more."""
    json: Path | None = None
    """Output file for the rows, as JSON; rewritten after each case, or after each suite if there are several."""
    use: tuple[Path, ...] = ()
    """Files that --json wrote, to use instead of measuring."""
    check: bool = False
    """Compare ratios and bytes with the recording; figures that look worse are measured again."""
    against: Path | None = None
    """Recording for --check to compare with. Default: the bundled recording for this hardware."""
    page: Path | None = None
    """Output file for an HTML page with plots."""
    markdown: Path | None = None
    """Output file for the tables, as Markdown."""
