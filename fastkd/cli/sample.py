"""`fastkd inspect --sample`: what a teacher said at some positions of a cache."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.table import sequence_columns
from ..errors import DataError
from ..utils.factories import is_factory, made_by
from ..utils.text import printable
from ..utils.words import counted

if TYPE_CHECKING:
    from ..cache import Cache

_BEFORE = 24  # tokens shown before a position
_SHOWN = 8  # entries
_WIDTH = 80
_SPACE = "\uffff"  # where a line is not broken; in no token, as it is no character
_OF_EXAMPLES = "the teacher's most likely classes, with their probabilities"


def sampled(cache: "Cache", count: int, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Positions from sequences all over the cache: each the middle one of those that count in its sequence, if any.

    Each has sequence, position, before (texts or ids), next, top [(token, probability)], tail, and the other inputs.
    """
    first, many = (cache.manifest.column(name).to_numpy() for name in ("first_sequence", "sequences"))
    order = np.argsort(first, kind="stable")
    first, ends = first[order], many[order].cumsum()
    total = int(ends[-1]) if len(ends) else 0
    found = []
    for place in np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)).tolist():
        shard = int(np.searchsorted(ends, place, side="right"))
        number = int(first[shard] + place - (ends[shard] - many[order][shard]))
        columns = sequence_columns(cache, number, tokenizer)
        rows = [i for i, tail in enumerate(columns["tail"]) if not math.isnan(tail)]
        if not rows:
            continue
        i = rows[len(rows) // 2]
        one: dict[str, Any] = {"sequence": number, "position": i}
        if "token" in columns:
            shown = columns.get("text", columns["token"])
            one["before"] = shown[max(0, i + 1 - _BEFORE) : i + 1]
            one["next"] = None if columns["label"][i] is None else shown[i + 1]
        one |= {name: columns[name][i] for name in cache.spec.inputs if name not in ("tokens", "loss_mask")}
        one |= {name: columns[name][i] for name in ("top", "tail", "draws") if name in columns}
        found.append(one)
    return found


def sample_text(sample: list[dict[str, Any]]) -> str:
    """For a person: some lines a position, of at most 80 columns."""
    of_text = any("before" in one for one in sample)
    what = "what comes before, the next token, and the teacher's most likely ones" if of_text else _OF_EXAMPLES
    lines = [f"Sample: {what}"]
    for one in sample:
        where = f"sequence {one['sequence']:,}, position {one['position']:,}"
        if "example" in one:
            seed = one.get("augmentation_seed")
            where = f"example {one['example']:,}" + (f", augmented with seed {seed}" if seed else "")
        lines.append(f"  {where}")
        if "before" in one:
            texts = one["before"]
            before = "".join(texts) if all(isinstance(text, str) for text in texts) else " ".join(map(str, texts))
            lines.append("    " + "…" + printable(before)[-(_WIDTH - 5) :])
        shown = [f"{_quoted(token)} {p:.3f}" for token, p in one["top"][:_SHOWN]]
        label = [] if one.get("next") is None else [f"next {_quoted(one['next'])}"]
        # stored probabilities are rounded: their sum may be above 1
        others = min(1.0, one["tail"] + sum(p for _, p in one["top"][_SHOWN:]))
        shown += [f"others {others:.3f}"] if others else []
        # a line is broken between tokens only, whose own spaces stay
        whole = [*(f"{text};" for text in label), *(f"{text}," for text in shown[:-1]), *shown[-1:]]
        wrapped = textwrap.wrap(
            " ".join(text.replace(" ", _SPACE) for text in whole), _WIDTH, initial_indent="    ",
            subsequent_indent="      ", break_on_hyphens=False,
        )  # fmt: skip
        lines += [line.replace(_SPACE, " ") for line in wrapped]
    return "\n".join(lines)


def classes_of(name: str, count: int) -> tuple[list[str], str]:
    """The names of `count` classes, and a warning if some have none: of a text file, a name a line; or of what
    module:factory returns, which is a list of them or has one as `class_names` or `classes`, as data sets of
    torchvision have. Raises DataError, also for more names, which are those of another classifier."""
    if is_factory(name):
        made = made_by(name, DataError)
        known = (made, getattr(made, "class_names", None), getattr(made, "classes", None))
        found = next((some for some in known if isinstance(some, (list, tuple)) and some), ())
    else:
        try:
            found = Path(name).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"classes: got {name}, which cannot be read ({error}); expected a name a line.") from error
    if not found or not all(isinstance(one, str) for one in found):
        raise DataError(f"classes: got {name}, which has no names; expected a text file with one a line, or a list.")
    if len(found) > count:
        raise DataError(f"classes: got {name} with {counted(len(found), 'name')}; expected {count:,}, one a class.")
    few = f"{name}: {counted(len(found), 'name')} for {count:,} classes; the others are shown by their numbers."
    return list(found), few if len(found) < count else ""


def hint(cache: "Cache", sample: list[dict[str, Any]]) -> str:
    """How numbers would become names."""
    if not any("before" in one for one in sample):
        return "numbers of classes: --classes FILE, with a name a line, shows their names"
    known = cache.spec.provenance.tokenizer
    name = known.name if known is not None and known.name else "NAME"
    return printable(f"ids of tokens: --tokenizer {name} shows their text")


def _quoted(token: Any) -> str:
    return f"'{printable(token)}'" if isinstance(token, str) else str(token)
