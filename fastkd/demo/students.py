"""The demo's students: the teacher with layers removed, as a folder; evaluated as it is, and trained from the cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import train
from ..cache import Cache
from ..evaluate.api import evaluate
from ..models.hub import load_transformers
from ..models.tokenizers import load_tokenizer
from ..settings import TrainSettings
from ..train.api import EVALUATION
from ..train.checkpoint import FOLDER as CHECKPOINTS
from ..train.load_student import make_student
from ..train.result import CONTROL, RUN, describe_cache, run_document
from ..train.trainer import autocast_of
from ..utils.atomic import remove_folder, write_folder, write_text
from ..utils.distributed import joined_processes
from ..utils.progress import mode_for
from ..utils.signals import Stop, Stopped
from .artifacts import Json, keep, there

MADE = "made.json"  # in a folder that was finished: what it was made of


def kept_layers(count: int, every: int) -> list[int]:
    """The layers that stay when of each `every` the middle one is removed: the first and the last do too much."""
    return [i for i in range(count) if i % every != every // 2]


def keep_layers(model: Any, numbers: list[int]) -> None:
    """Leave only these layers in a decoder of transformers."""
    kept = nn.ModuleList(model.base_model.layers[i] for i in numbers)
    model.base_model.layers = kept
    for place, layer in enumerate(kept):
        attention: Any = layer.self_attn
        attention.layer_idx = place  # where a key-value cache looks for it
    model.config.num_hidden_layers = len(numbers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in numbers]


def have_cut(teacher: Path, folder: Path, every: int, of: Json) -> bool:
    """Have a folder with the teacher less one layer in `every`, and its tokenizer. Whether it had to be made."""
    if there(folder / MADE, of) is not None:
        return False
    model: Any = load_transformers().AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    keep_layers(model, kept_layers(len(model.base_model.layers), every))

    def fill(place: Path) -> None:
        model.save_pretrained(place)
        load_tokenizer(teacher).save(place)
        keep(place / MADE, of, {})

    write_folder(folder, fill)
    return True


def have_evaluated(student: Path, cache: Cache, out: Path, settings: TrainSettings, of: Json) -> bool:
    """Have a run's folder for a student as it is, without a step: run.json, evaluation.json. Whether it was measured
    now."""
    if there(out / MADE, of) is not None:
        return False
    with joined_processes(settings.device) as processes:
        made = make_student(student, cache.spec, settings).student.to(processes.device)
        made.autocast = autocast_of(settings.precision, processes.device)
        found = evaluate(made, cache, batch_tokens=settings.micro_tokens, progress=mode_for() == "bar")
        document = run_document(
            made, made.parameters_and_bytes, {"caches": [describe_cache(cache)]}, processes.device, 1
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / EVALUATION, json.dumps(found.to_json()) + "\n")
    write_text(out / RUN, json.dumps(document, indent=1) + "\n")
    keep(out / MADE, of, {})
    return True


def have_trained(
    student: Path, cache: Cache, out: Path, settings: TrainSettings, of: Json, *, control: bool, stop: Stop | None
) -> bool:
    """Have a run of `fastkd.train`, finished; one of the same is taken as it is. Whether anything had to be trained.

    One that was interrupted goes on; a finished one of something else is replaced. `Stopped` where a stop was asked
    for. Of what is finished, checkpoints are of no more use, and removed: they are three times the student's size.
    """
    if there(out / MADE, of) is not None:
        return False
    if (out / MADE).exists():
        remove_folder(out)
    report = train(student, cache, out, settings, control=control, stop=stop, progress=mode_for())
    if not report.complete:
        raise Stopped
    keep(out / MADE, of, {})
    for folder in (out, out / CONTROL):
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return True
