"""The cards of a run: README.md in the folders of its students, from what the run says of itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..settings import ShareSettings
from ..utils.atomic import drop_parts, write_text
from .arms import CONTROL, WITHOUT_FEATURES
from .card import is_template, model_card, written_by_fastkd
from .held_out import EVALUATION
from .lora import MERGED
from .result import CARD, RUN, STUDENT, STUDENTS

SHARE = ShareSettings()


def write_cards(out: Path, *, text: bool, share: ShareSettings = SHARE) -> None:
    """Write the card of a finished run's student, and of what was exported or trained beside it.

    text: whether it is trained on text, and not on examples. A card that a person wrote, or changed, is left.
    """
    control = _summary(out / CONTROL / EVALUATION)
    for arm in ("", WITHOUT_FEATURES, CONTROL):
        if (run := _read(out / arm / RUN)) is None:
            continue
        # a folder of the Hub's cache is named by a hash
        base = run["student"].get("base", "")
        known = share.push or (base if "/" in base else "")
        name = known.rpartition("/")[2] or str(run["student"]["name"])
        evaluations = {STUDENT: _summary(out / arm / EVALUATION), CONTROL: control}
        common: dict[str, Any] = {"evaluations": evaluations, "teacher": share.card_teacher, "text": text}
        folder = out / arm / STUDENT
        write_card(folder, run, name=f"{name}-{arm}" if arm else name, repo=None if arm else share.push, **common)
        for part in (run.get("report") or {}).get("exported") or {}:
            measured = "" if part == MERGED else part  # the same function as the student
            write_card(folder.with_name(f"{STUDENT}-{part}"), run, name=f"{name}-{part}", part=measured, **common)


def write_peer_cards(out: Path, *, text: bool) -> None:
    """Write the cards of students that were trained together."""
    if (run := _read(out / RUN)) is None:
        return
    students: Mapping[str, Any] = run["students"]
    for name, about in students.items():
        found = run["report"]["students"].get(name, {})
        verdicts = {CONTROL: found["verdict"]} if "verdict" in found else {}
        report = {name: run["report"].get(name) for name in ("step", "steps")} | found | {"verdicts": verdicts}
        evaluations = {
            STUDENT: _summary(out / EVALUATION.replace(".", f"-{name}.")),
            CONTROL: _summary(out / CONTROL / name / EVALUATION),
        }
        peers = [other for other in students if other != name]
        one = dict(run) | {"student": about, "report": report, "peers": peers}
        write_card(out / STUDENTS / name, one, evaluations=evaluations, name=name, text=text)


def write_card(folder: Path, run: Mapping[str, Any], **about: Any) -> None:
    """Write the card of a folder with a model, if there is one, unless a person wrote or changed it. about: for
    `model_card`."""
    if not folder.is_dir():
        return
    library = next((name for file, name in _LIBRARIES.items() if (folder / file).exists()), None)
    text, path = model_card(run, library=library, **about), folder / CARD
    there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if there is None or is_template(there) or (there != text and written_by_fastkd(there)):
        drop_parts(path)  # this folder is given to others
        write_text(path, text)


_LIBRARIES = {"adapter_config.json": "peft", "config.json": "transformers"}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _summary(path: Path) -> Mapping[str, Any]:
    """The measures in an evaluation.json; none of a mixture, which has several."""
    found: Any = _read(path)  # a list where an earlier version ended with an error
    return (found.get("summary") or {}) if isinstance(found, dict) else {}
