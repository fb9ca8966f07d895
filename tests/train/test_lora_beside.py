"""Adapters beside the other parts of a training: features, exits, averages, students that learn from each other,
generations, recomputed and compiled layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import model_of
from train_cases import CAPTURE, SMALL, bits, documents, make_cache

import fastkd
from fastkd.errors import StreamError, TrainError
from fastkd.live.generators.vllm import Generator
from fastkd.settings import LiveSettings, TrainSettings
from fastkd.teachers.load import as_teacher
from fastkd.train.checkpoint import newest
from fastkd.train.student import make_student
from fastkd.train.trainer import Pause

pytestmark = pytest.mark.usefixtures("one_thread")
LIVE = LiveSettings(**CAPTURE)
LORA: dict[str, Any] = SMALL | {"steps": 4, "lora_rank": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    model_of("llama", seed=5).save_pretrained(folder / "base")
    make_cache(folder / "cache")
    return folder


def names_of(run: Path) -> set[str]:
    found = newest(run)
    assert found is not None
    return set(found.shapes("model"))


def resumed(student: Any, place: Path, out: Path, changes: dict[str, Any], **more: Any) -> None:
    """A pause and a resume come to the same bits; the checkpoints have adapters alone."""
    assert fastkd.train(student, place, out / "whole", **changes, **more).complete
    assert not fastkd.train(student, place, out / "parts", **changes, **more, pause=Pause((), 2)).complete
    assert fastkd.train(student, place, out / "parts", **changes, **more).resumed == 2
    assert bits(out / "whole", 4) == bits(out / "parts", 4)
    assert not [name for name in names_of(out / "whole") if "base_layer" in name or "embed" in name or "norm" in name]


def test_the_average_of_a_student(place: Path, tmp_path: Path) -> None:
    """Its average is of adapters as well, and exported as one."""
    changes = LORA | {"export_teacher": True}
    given = {"teacher": "ema:0.5", "data": documents(), "live": LIVE}
    assert fastkd.train(place / "base", None, tmp_path / "run", **changes, **given).complete
    names = names_of(tmp_path / "run")
    assert {name.partition("base_model")[0] for name in names} == {"model.", "live.model."}
    assert all("lora_" in name for name in names)
    config = json.loads((tmp_path / "run" / "student-ema" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")
    ours, average = (make_student(tmp_path / "run" / name, None).student for name in ("student", "student-ema"))
    different = [not torch.equal(a, b) for a, b in zip(ours.parameters(), average.parameters(), strict=True)]
    assert sum(different) == sum(p.requires_grad for p in ours.parameters())


def test_recomputed_layers(place: Path, tmp_path: Path) -> None:
    for name, recomputed in (("plain", False), ("recomputed", True)):
        changes = LORA | {"activation_checkpointing": recomputed, "checkpoint_every": 4}
        assert fastkd.train(place / "base", place / "cache", tmp_path / name, **changes).complete
    files = [
        (tmp_path / name / "student" / "adapter_model.safetensors").read_bytes() for name in ("plain", "recomputed")
    ]
    assert files[0] == files[1]


@pytest.mark.soak
def test_exits(place: Path, tmp_path: Path) -> None:
    resumed(place / "base", place / "cache", tmp_path, LORA | {"exits": (1,)})


@pytest.mark.soak
def test_students_that_learn_from_each_other(place: Path, tmp_path: Path) -> None:
    students = {"one": place / "base", "two": place / "base"}
    report = fastkd.mutual(students, place / "cache", tmp_path / "run", **LORA, every=2)
    assert report.complete
    assert all("lora_" in name for name in names_of(tmp_path / "run"))
    for name in students:
        assert (tmp_path / "run" / "students" / name / "adapter_model.safetensors").exists()
    with pytest.raises(TrainError, match="lora_merge: got it for students that learn from each other"):
        fastkd.mutual(students, place / "cache", tmp_path / "other", **LORA, lora_merge=True)


@pytest.mark.soak
def test_generations(place: Path, tmp_path: Path) -> None:
    """An adapter folder is the next teacher."""
    teacher = as_teacher(model_of("llama", seed=8))
    changes = {**LORA, "evaluate_every": None}
    report = fastkd.generations(
        2, place / "base", teacher, documents(), tmp_path / "out", live=LIVE, ensemble=False, **changes
    )
    assert report.complete
    assert len(list((tmp_path / "out").rglob("student/adapter_model.safetensors"))) == 2


def test_vllm_is_refused(place: Path) -> None:
    student = make_student(place / "base", None, TrainSettings(lora_rank=2)).student
    with pytest.raises(StreamError, match="got 'vllm' for base, which has an adapter"):
        Generator(student)
