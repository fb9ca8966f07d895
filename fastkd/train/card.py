"""The model card of a trained student, a pure function of run.json and evaluation.json: README.md as the Hugging Face
Hub reads it.

A card names no place on the machine: of paths and URLs only the last part is left, and the teacher is what the person
called it, or is not named.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..evaluate.measures import MEASURES, Measure
from ..utils.front_matter import front_matter
from ..utils.numbers import size_text
from ..utils.secrets import masked
from ..utils.text import printable
from .arms import CONTROL

Document = Mapping[str, Any]
TAGS = ("knowledge-distillation", "fastkd")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
TEACHER = "TEACHER"
"""What stands for the teacher in a command, unless the person named it."""
_ABOUT_SHARING = {"--push": 1, "--push-private": 0, "--card-teacher": 1}  # options, and how many values they have
_SEAL = re.compile(
    r"\n<!-- Written by fastkd, and written anew by it unless it is changed: sha256 ([0-9a-f]{64}) -->\n\Z"
)
_SETTINGS = (
    "alpha", "alpha_end", "temperature", "temperature_end", "divergence", "treatment", "rate", "rate_schedule",
    "batch_tokens", "batch_size", "seed",
)  # fmt: skip


def model_card(
    run: Document,
    evaluations: Mapping[str, Document] | None = None,
    *,
    name: str,
    library: str | None = None,
    teacher: str | None = None,
    repo: str | None = None,
    part: str = "",
    text: bool = True,
) -> str:
    """The text of a card, sealed (see `written_by_fastkd`).

    run: what run.json holds. Of its members are read, as far as they are there: student (name, class, parameters,
        base: the model that it began as, by its id on the Hub or its name; license: as in the metadata of that model's
        own card), caches (each as of `describe_cache`), settings, command, machine, report (step, evaluation, control,
        verdicts), and peers (the students that it was trained together with).
    evaluations: the summaries of evaluation.json, {measure: {"mean", "low", "high"}}, of "student" and of "control",
        for their intervals.
    name: of the student. library: "transformers", "peft", or None for a torch module. teacher: its name, if the card
        may say it. repo: on the Hub, if it is known. part: what else of the student this is, by the prefix of its
        measures: "ema". text: whether it is a causal language model; False for a classifier of examples.
    """
    run, teacher = masked(dict(run)), masked(teacher)
    found = _Results(run.get("report") or {}, evaluations or {}, part)
    caches = [cache for cache in run.get("caches") or () if isinstance(cache, Mapping)]
    metadata = _metadata(run, found, caches, name=name, library=library, text=text)
    sections = [
        f"# {_plain(name)}",
        _about(run, found, caches, teacher, part),
        *_evaluation(found, text),
        *_training(run, teacher),
        *_use(run, library, repo),
    ]
    body = "\n".join([front_matter(metadata), "\n\n".join(sections), ""])
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{body}\n<!-- Written by fastkd, and written anew by it unless it is changed: sha256 {digest} -->\n"


def written_by_fastkd(text: str) -> bool:
    """Whether a card is one that `model_card` returned, and nobody has changed."""
    seal = _SEAL.search(text)
    return seal is not None and hashlib.sha256(text[: seal.start()].encode()).hexdigest() == seal[1]


def is_template(text: str) -> bool:
    """Whether a card is the Hub's template, as PEFT saves it with an adapter, with nothing filled in."""
    return "\n# Model Card for Model ID\n" in text


def last_part(place: str) -> str:
    """The last part of a path or a URL: its name, without where it lies."""
    return re.split(r"[/\\]", place.partition("?")[0].rstrip("/\\"))[-1] or "…"


def shown_command(command: Sequence[str], *, base: str | None = None, teacher: str | None = None) -> str:
    """A command line as others may read it: places by their last part, the teacher by its name or as `TEACHER`, without
    what is about sharing. base: an id on the Hub, which is kept."""
    shown: list[str] = []
    option, skip = "", 0
    for argument in command:
        if skip:
            skip -= 1
            continue
        flag, equals, value = argument.partition("=")
        if flag in _ABOUT_SHARING:
            skip = 0 if equals else _ABOUT_SHARING[flag]
            continue
        if argument.startswith("--"):
            option, value = flag, value if equals else ""
            if not equals:
                shown.append(argument)
                continue
        else:
            flag, value = "", argument
        if option == "--teacher" and not value.startswith("ema:"):
            value = teacher or TEACHER
        elif value != base and re.search(r"[/\\]", value):
            value = last_part(value)
        shown.append(f"{flag}={_quoted(value)}" if flag else _quoted(value))
    return " ".join(shown)


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w.,:=/@%+*-]+", value) else "'" + value.replace("'", "'\\''") + "'"


class _Results:
    """The measures of the student and of its control, in the order of `MEASURES`.

    student, control: (mean, low, high) by measure; the ends are None where they are not known. difference: student
    minus control, with the verdict. step, steps: made, and in all.
    """

    def __init__(self, report: Document, evaluations: Mapping[str, Document], part: str) -> None:
        prefix = f"{part}/" if part else ""
        self.step, self.steps = report.get("step"), report.get("steps")
        summaries = {} if part else evaluations
        self.student = _figures(report, summaries.get("student"), prefix)
        control = report.get("control") or {}
        self.control = _figures(control, evaluations.get(CONTROL), "") if control else {}
        judged = {} if part else (report.get("verdicts") or {}).get(CONTROL) or {}
        self.difference: Mapping[str, Document] = judged.get("difference") or {}
        self.windows = judged.get("windows")

    @property
    def measures(self) -> list[Measure]:
        return [measure for name, measure in MEASURES.items() if name in self.student]


def _figures(report: Document, summary: Document | None, prefix: str) -> dict[str, tuple[float, Any, Any]]:
    found = {}
    for key, value in (report.get("evaluation") or {}).items():
        if key.startswith(prefix) and (name := key.removeprefix(prefix)) in MEASURES and math.isfinite(value):
            one = (summary or {}).get(name) or {}
            # the summary of one cache; of a mixture, the report has means over its caches
            same = one.get("mean") is not None and math.isclose(one["mean"], value, rel_tol=1e-6)
            found[name] = (value, one.get("low"), one.get("high")) if same else (value, None, None)
    return found


def _metadata(
    run: Document, found: _Results, caches: Sequence[Document], *, name: str, library: str | None, text: bool
) -> dict[str, Any]:
    """The metadata at the head of the card: https://huggingface.co/docs/hub/model-cards."""
    student = run.get("student") or {}
    metadata: dict[str, Any] = {"library_name": library or "pytorch"}
    if text and library is not None:
        metadata["pipeline_tag"] = "text-generation"
    if student.get("base"):
        metadata["base_model"] = re.sub(r"[^\w./-]+|\s", "-", student["base"], flags=re.ASCII)
    metadata |= student.get("license") or {}
    adapter = (student.get("adapter") or {}) if library == "peft" else {}
    metadata["tags"] = [*TAGS, *([str(adapter["kind"]).lower()] if "kind" in adapter else [])]
    if found.student:
        task = {"type": "text-generation", "name": "next-token prediction"}
        dataset: dict[str, Any] = {"type": "fastkd-cache", "name": "held-out split"}
        if caches:
            names = ", ".join(last_part(str(cache.get("place", "cache"))) for cache in caches)
            dataset["name"] = f"held-out split of {names}"
            dataset["args"] = {"spec": [str(cache.get("spec", "")) for cache in caches]}
        dataset["split"] = "held_out"
        metrics = [
            {"type": measure.name, "name": measure.label, "value": _rounded(found.student[measure.name][0])}
            for measure in found.measures
        ]
        result = {"task": task if text else {"type": "other", "name": "classification"}, "dataset": dataset}
        metadata["model-index"] = [{"name": name, "results": [{**result, "metrics": metrics}]}]
    return metadata


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _about(run: Document, found: _Results, caches: Sequence[Document], teacher: str | None, part: str) -> str:
    student = run.get("student") or {}
    size = student.get("parameters")
    settings, peers = run.get("settings") or {}, run.get("peers") or ()
    if settings.get("alpha") == 1.0 and settings.get("alpha_end") in (None, 1.0):
        lines = ["A model trained by fastkd on hard labels alone."]
    elif peers:
        also = f", and from {_plain(teacher)}" if teacher else ""
        names = ", ".join(f"`{_code(str(peer))}`" for peer in peers)
        lines = [f"A student trained by fastkd together with {names}: each learned from the others{also}."]
    else:
        whose = f"**{_plain(teacher)}**" if teacher else "a teacher that is not named here"
        lines = [f"A student that fastkd distilled from {whose}."]
    if base := student.get("base"):
        on_hub = _HUB_ID.fullmatch(base)
        lines.append(
            f"It began as [{base}](https://huggingface.co/{base})." if on_hub else f"It began as {_plain(base)}."
        )
    if part:
        lines.append(f"This is its part `{_code(part)}`.")
    facts = [f"- Parameters: {size:,}"] if size else []
    if (trained := (student.get("adapter") or {}).get("trained_parameters")) is not None:
        facts.append(f"- Trained: an adapter ({_plain(str(student['adapter'].get('kind')))}) of {trained:,} parameters")
    for cache in caches:
        facts.append(f"- Cache of the teacher's targets: {_cache(cache)}")
    if found.step is not None:
        facts.append(f"- Training: {found.step:,} steps")
    return " ".join(lines) + ("\n\n" + "\n".join(facts) if facts else "")


def _cache(cache: Document) -> str:
    parts = [f"`{_code(last_part(str(cache.get('place', 'cache'))))}`"]
    if spec := cache.get("spec"):
        parts.append(f"spec sha256 `{_code(str(spec))[:64]}`")
    if (positions := cache.get("positions")) is not None:
        parts.append(f"{positions:,} positions in {size_text(cache.get('bytes') or 0)}")
    if cache.get("k") is not None:
        draws = f" and {cache['draws']} draws" if cache.get("draws") else ""
        parts.append(f"k = {cache['k']}{draws} of {cache.get('vocab_size', 0):,} outcomes")
    return ", ".join(parts)


def _evaluation(found: _Results, text: bool) -> Iterator[str]:
    """The table of the student beside its control."""
    if not found.student:
        return
    heads = ["held out", "student"]
    if found.control:
        heads += ["control", "student - control"] if found.difference else ["control"]
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for measure in found.measures:
        better = f", {measure.better} is better" if measure.better else ""
        unit = f" ({measure.unit}{better})" if measure.unit else better
        row = [f"{measure.label}{unit}", _figure(measure, found.student.get(measure.name))]
        if found.control:
            row.append(_figure(measure, found.control.get(measure.name)))
        if len(heads) > 3:
            one = found.difference.get(measure.name)
            figure = _figure(measure, one and (one["mean"], one["low"], one["high"]), sign=True)
            row.append(f"{figure}: {one['verdict']}" if one and figure else figure)
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    units = "windows" if text else "examples"
    said = f"On the {units} that were held out of training, with intervals of 95% over {units}."
    if found.control:
        said += " The control is the same model, trained on the same data in the same order on hard labels alone."
    if found.difference:
        said += f" Differences are paired by {units[:-1]}."
    yield f"## Evaluation\n\n{said}\n\n" + "\n".join(lines)


def _figure(measure: Measure, value: Any, *, sign: bool = False) -> str:
    if not value:
        return ""
    mean, low, high = (None if x is None else x * measure.scale for x in value)
    count = 2 if measure.unit == "%" else 4
    plus = "+" if sign else ""
    text = f"{mean:{plus}z.{count}f}"
    return text if low is None or high is None else f"{text} [{low:{plus}z.{count}f}, {high:{plus}z.{count}f}]"


def _training(run: Document, teacher: str | None) -> Iterator[str]:
    settings, command = run.get("settings") or {}, run.get("command") or []
    parts = []
    if command:
        base = (run.get("student") or {}).get("base")
        parts.append(f"    {printable(shown_command(command, base=base, teacher=teacher))}")
    told = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if told:
        parts.append(", ".join(f"{name} {_plain(str(value))}" for name, value in told.items()) + ".")
    machine = run.get("machine") or {}
    versions = [f"{name} {machine[name]}" for name in ("fastkd", "torch", "transformers") if machine.get(name)]
    if versions:
        device = machine.get("gpu") or machine.get("device")
        where = f"; {machine.get('processes', 1)} x {device}" if device else ""
        parts.append(_plain(f"{', '.join(versions)}{where}."))
    if parts:
        yield "## Training\n\n" + "\n\n".join(parts)


def _use(run: Document, library: str | None, repo: str | None) -> Iterator[str]:
    place = json.dumps(repo or "FOLDER")
    if library in ("transformers", "peft"):
        kind, package = "AutoModelForCausalLM", "transformers"
        if library == "peft":
            kind, package = "AutoPeftModelForCausalLM", "peft"
        lines = [f"from {package} import {kind}", "", f"model = {kind}.from_pretrained({place})"]
    else:
        kind = _code(str((run.get("student") or {}).get("class") or "your module"))
        lines = [
            "from safetensors.torch import load_file", "",
            f"# model: a {kind}, as it was trained",
            'model.load_state_dict(load_file("model.safetensors"), strict=False)',
        ]  # fmt: skip
    yield "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _plain(text: str) -> str:
    """Text that is no markup, in a line of Markdown or a cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(text))


def _code(text: str) -> str:
    """Text between backticks."""
    return printable(text).replace("`", "'").replace("|", "¦")
