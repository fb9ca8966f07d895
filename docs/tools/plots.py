"""The pictures of the documentation, drawn from real numbers.

python docs/tools/plots.py result demo                             students of a finished demo, held out
python docs/tools/plots.py concepts CACHE --tokenizer FOLDER       one soft target, truncation, bytes of a shard

Both write docs/pictures/NAME-light.svg and NAME-dark.svg (--out FOLDER: elsewhere). Any cache of text will do.
"""

import argparse
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastkd.cache import open_cache

COLOURS = {  # Okabe and Ito's, lighter on a dark page
    "light": {"ink": "#1c2126", "grey": "#68727d", "grid": "#dfe3e8", "blue": "#0072b2", "orange": "#c44e00"},
    "dark": {"ink": "#e4e8ec", "grey": "#98a2ad", "grid": "#30363d", "blue": "#4aa8e0", "orange": "#f08a4b"},
}
STYLES = ((0, ()), (0, (5, 2)), (0, (2, 1.5)), (0, (1, 1.5)))  # lines that differ without colour
Draw = Callable[[dict[str, str]], Figure]


def save(name: str, draw: Draw, out: Path) -> None:
    """Draw once for a light and once for a dark page."""
    out.mkdir(parents=True, exist_ok=True)
    for palette, colours in COLOURS.items():
        settings = {
            "svg.hashsalt": name,
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": colours["ink"],
            "axes.edgecolor": colours["grey"],
            "axes.labelcolor": colours["ink"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": colours["ink"],
            "ytick.color": colours["ink"],
            "grid.color": colours["grid"],
        }
        with mpl.rc_context(settings):
            figure = draw(colours)
            path = out / f"{name}-{palette}.svg"
            figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        # the reader's own fonts
        path.write_text(path.read_text().replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif"))


def result(report: dict[str, Any], at_least: float) -> Draw:
    """Held-out cross-entropy and KL of a demo's students, with 95% intervals.

    report: report.json. at_least: a lower bound of the teacher's cross-entropy, in nats.
    """
    rows = {
        "pruned, not trained": "damaged",
        "trained on labels": "healed, control",
        "on the teacher": "soft",
        "on both": "healed",
    }

    def draw(colours: dict[str, str]) -> Figure:
        figure, axes = plt.subplots(1, 2, figsize=(5.4, 2.0), sharey=True)
        for axis, measure, label in zip(
            axes, ("kl_bucket", "cross_entropy"), ("KL to the teacher, nats", "cross-entropy, nats"), strict=True
        ):
            for place, (_, student) in enumerate(rows.items()):
                value = report["students"][student][measure]
                taught = student in ("soft", "healed")
                colour = colours["blue"] if taught else colours["orange"]
                axis.hlines(place, value["low"], value["high"], color=colour, linewidth=3)
                axis.plot(value["mean"], place, "o" if taught else "s", color=colour, markersize=6)
                axis.annotate(
                    f"{value['mean']:.2f}", (value["mean"], place), (0, 6), textcoords="offset points", ha="center"
                )
            axis.set_xlabel(label)
            axis.grid(axis="x")
            axis.set_axisbelow(True)
            axis.set_ylim(len(rows) - 0.6, -0.7)
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].set_xlim(0, None)
        axes[1].axvline(at_least, color=colours["grey"], linestyle="--", linewidth=1)
        axes[1].annotate("teacher", (at_least, 0.1), (3, 0), textcoords="offset points", color=colours["grey"])
        axes[1].set_xlim(at_least - 0.25, None)
        figure.tight_layout(w_pad=2)
        return figure

    return draw


def teacher_cross_entropy(demo: Path) -> float:
    """A lower bound of the teacher's cross-entropy on the held-out split, in nats, as a student's evaluation has it."""
    teacher = json.loads((demo / "healed" / "evaluation.json").read_text())["teacher"]
    return float(sum(teacher["sums"]["cross_entropy_at_least"]) / sum(teacher["counts"]))


def soft_target(before: str, tokens: list[str], probability: NDArray[Any], rest: NDArray[Any]) -> Draw:
    """The most likely next tokens at one position, at T = 1 and 2, and everything else.

    probability: `[2, tokens]`. rest: `[2]`, the probability of all other tokens.
    """

    def draw(colours: dict[str, str]) -> Figure:
        figure, axis = plt.subplots(figsize=(4.8, 3.8))
        places = np.arange(len(tokens) + 1)
        for number, (name, colour) in enumerate((("T = 1", "blue"), ("T = 2", "orange"))):
            values = np.append(probability[number], rest[number])
            offset = 0.2 * (2 * number - 1)
            hatch = "////" if number else None
            face = "none" if number else colours[colour]
            axis.barh(places + offset, values, 0.38, label=name, facecolor=face, edgecolor=colours[colour], hatch=hatch)
            for place, value in zip(places, values, strict=True):
                axis.annotate(
                    f"{value:.3f}", (value, place + offset), (3, 0), textcoords="offset points", va="center", fontsize=8
                )
        axis.set_yticks(places, [*(f"“{token}”" for token in tokens), "all others"])
        axis.invert_yaxis()
        axis.set_xlabel("the teacher's probability of the next token")
        axis.set_title(f"…{before} ▁", loc="left", fontsize=10)
        axis.legend(frameon=False, loc="center right")
        return figure

    return draw


def truncation(mass: dict[float, NDArray[Any]], k: int) -> Draw:
    """The share of the teacher's probability that the first entries hold, by temperature.

    mass: for each temperature `[k]`, the mean over positions for 1, 2, ... entries.
    """

    def draw(colours: dict[str, str]) -> Figure:
        figure, axis = plt.subplots(figsize=(4.4, 2.8))
        for style, (temperature, held) in zip(STYLES, mass.items(), strict=False):
            axis.plot(np.arange(1, k + 1), held, linestyle=style, color=colours["blue"], linewidth=2)
            text = f"T = {temperature:g}: {held[-1]:.2f}"
            axis.annotate(text, (k, held[-1]), (5, 0), textcoords="offset points", va="center")
        axis.set_xscale("log", base=2)
        ticks = [2**i for i in range(12) if 2**i < k] + [k]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(1, k)
        axis.set_ylim(0, 1)
        axis.grid()
        axis.set_xlabel("top-k entries kept")
        axis.set_ylabel("share of the probability")
        return figure

    return draw


def shard(sizes: dict[str, float]) -> Draw:
    """Bytes a position of each part of a shard's file."""

    def draw(colours: dict[str, str]) -> Figure:
        figure, axis = plt.subplots(figsize=(3.6, 0.4 + 0.34 * len(sizes)))
        axis.barh(list(sizes), list(sizes.values()), 0.6, color=colours["blue"])
        for place, size in enumerate(sizes.values()):
            axis.annotate(f"{size:.1f}", (size, place), (4, 0), textcoords="offset points", va="center")
        axis.invert_yaxis()
        axis.set_xlabel(f"bytes a position ({sum(sizes.values()):.1f} in all)")
        return figure

    return draw


PARTS = {  # arrays of a shard by what they are for
    "ids of the top-k entries": ("head/classes", "head/firsts", "head/ties", "head/counts"),
    "their log-probabilities": ("head/values", "head/grid"),
    "ids and counts of the draws": ("draws/classes", "draws/firsts", "draws/ties", "draws/counts", "draws/repeats"),
    "their log-probabilities ": ("draws/values", "draws/grid"),
    "tail at each temperature": ("tail",),
    "tokens": ("inputs/tokens",),
}


def shard_sizes(path: Path, positions: int) -> dict[str, float]:
    """Bytes a position of the parts of a shard on this machine."""
    with zipfile.ZipFile(path) as file:
        sizes = {info.filename: info.file_size for info in file.infolist()}
    chunks = {name.split("/c/")[0]: size for name, size in sizes.items() if "/c/" in name}
    found = {part: sum(chunks.pop(name, 0) for name in names) / positions for part, names in PARTS.items()}
    rest = path.stat().st_size / positions - sum(found.values())
    return {part: size for part, size in found.items() if size} | {"metadata and the rest": rest}


def concepts(folder: Path, tokenizer: str, sequence: int, position: int, out: Path) -> None:
    """Draw all pictures of docs/concepts.md from a cache."""
    from transformers import AutoTokenizer

    cache = open_cache(folder)
    names = AutoTokenizer.from_pretrained(tokenizer)
    arrays = cache.sequences([sequence])
    grid = cache.spec.temperatures
    shown = 8
    exact = arrays["draws"][position] == 0 if "draws" in arrays else np.ones(arrays["ids"].shape[1], bool)
    ids, logprobs = (arrays[name][position][exact][:shown] for name in ("ids", "logprobs"))
    whole = arrays["logprobs"][position][exact].astype(np.float64)
    probability = np.empty((2, shown))
    for row, temperature in enumerate((1.0, 2.0)):
        tail = float(arrays["tail"][position, grid.index(temperature)])
        partition = np.logaddexp.reduce([*(whole / temperature), tail])
        probability[row] = np.exp(logprobs.astype(np.float64) / temperature - partition)
    before = names.decode(arrays["tokens"][max(0, position - 11) : position + 1]).replace("\n", " ")
    tokens = [names.decode([token]).replace("\n", "\\n") for token in ids.tolist()]
    save("soft-target", soft_target(before, tokens, probability, 1 - probability.sum(1)), out)

    path = min((folder / "shards").glob("*.zarr.zip"))
    number = int(path.name.split(".")[0])
    rows = cache.read_shard(number)
    save("truncation", truncation(kept_mass(rows, grid, cache.spec.k), cache.spec.k), out)
    save("shard", shard(shard_sizes(path, len(rows["ids"]))), out)


def kept_mass(arrays: dict[str, NDArray[Any]], grid: tuple[float, ...], k: int) -> dict[float, NDArray[Any]]:
    """For each stored temperature `[k]`, the mean share of the probability in the first 1, 2, ... top-k entries."""
    ids_NK = arrays["logprobs"].astype(np.float64)[:, :k]
    if "draws" in arrays:
        ids_NK = np.where(arrays["draws"][:, :k] == 0, ids_NK, -np.inf)
    counted = np.isfinite(ids_NK).any(1)
    found = {}
    for place, temperature in enumerate(grid):
        scaled = ids_NK[counted] / temperature
        partition = np.logaddexp(np.logaddexp.reduce(scaled, axis=1), arrays["tail"][counted, place])
        found[temperature] = np.exp(scaled - partition[:, None]).cumsum(1).mean(0)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["result", "concepts"])
    parser.add_argument("source", type=Path, help="folder of a demo, or a cache")
    parser.add_argument("--tokenizer", default="demo/teacher", help="folder or Hub name")
    parser.add_argument("--sequence", type=int, default=0, help="of the soft target")
    parser.add_argument("--position", type=int, default=40, help="of the soft target, in its sequence")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "pictures")
    chosen = parser.parse_args()
    if chosen.picture == "result":
        report = json.loads((chosen.source / "report.json").read_text())
        save("result", result(report, teacher_cross_entropy(chosen.source)), chosen.out)
    else:
        concepts(chosen.source, chosen.tokenizer, chosen.sequence, chosen.position, chosen.out)
