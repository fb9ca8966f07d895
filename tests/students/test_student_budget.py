"""`fastkd student`: what does not matter is what is removed, the result fits its budget, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import model_of, saved, tokenizer_of
from train_cases import documents
from vision_cases import make_cache as make_image_cache

import fastkd
from fastkd.cache import open_cache
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.evaluate.api import evaluate
from fastkd.models.hub import load_transformers
from fastkd.models.pruned import OriginalLayers, keep_layers, original_layers
from fastkd.settings import StudentSettings
from fastkd.students.api import student
from fastkd.students.budget import read_budget
from fastkd.students.result import NEW, PRUNED, StudentReport
from fastkd.train.student import make_student

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 5
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def teacher_of(**changes: Any) -> Any:
    return model_of("llama", num_hidden_layers=LAYERS, initializer_range=0.2, **{**SIZES, **changes})


def captured(place: Path, model: Any) -> Path:
    """A folder with a teacher, and its cache."""
    model.save_pretrained(place / "teacher")
    fastkd.capture(model, documents(60), place / "cache", k=20, draws=3, context=16, held_out=0.2)
    return place


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose layer 3 adds nothing, and whose layers 0 and 1 do little."""
    model = teacher_of()
    with torch.no_grad():
        for number, factor in ((3, 0.0), (0, 0.005), (1, 0.03)):
            model.model.layers[number].self_attn.o_proj.weight *= factor
            model.model.layers[number].mlp.down_proj.weight *= factor
    return captured(tmp_path_factory.mktemp("idle"), model)


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in each of whose layers half of the MLP's units, other ones in each, add nothing."""
    model = teacher_of()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, torch.randperm(64, generator=generator)[:32]] = 0
    return captured(tmp_path_factory.mktemp("dead"), model)


def made(place: Path, out: Path, **settings: Any) -> StudentReport:
    return student(place / "teacher", out, StudentSettings(device="cpu", **settings), cache=place / "cache")


def test_layers_that_add_nothing_go_first(idle: Path, tmp_path: Path) -> None:
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32
    whole = 2 * 96 * 32 + 32 + LAYERS * layer
    found = made(idle, tmp_path / "out", at_most=f"{(whole - layer) / 1000}k", positions=400)
    assert found.kind == PRUNED
    assert found.order[0] == 3
    assert found.layers == (0, 1, 2, 4)
    assert found.parameters == whole - layer
    assert found.teacher == whole
    assert found.teacher_kl is not None
    assert found.candidates[0].kl == pytest.approx(found.teacher_kl, abs=1e-4)
    assert len(found.candidates) > 3
    assert all(one.size <= whole - layer for one in found.candidates)
    kls = [one.kl for one in found.candidates if one.positions == found.candidates[0].positions]
    assert kls == sorted(kls)
    assert found.order[:3] == [3, 0, 1] or len(found.order) < 3
    # it is the teacher, but for that layer
    model = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    teacher = load_transformers().AutoModelForCausalLM.from_pretrained(idle / "teacher")
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, teacher(tokens).logits, rtol=1e-4, atol=1e-4)
    assert original_layers(model) == OriginalLayers((0, 1, 2, 4), LAYERS)
    loaded = make_student(tmp_path / "out", open_cache(idle / "cache").spec)
    held_out = evaluate(loaded.student, idle / "cache").intervals()["kl_bucket"].mean
    assert held_out < 0.05


def test_several_layers_go_in_the_order_of_what_they_add(idle: Path, tmp_path: Path) -> None:
    found = made(idle, tmp_path / "out", at_most="30k", positions=400)
    assert list(found.order[:3]) == [3, 0, 1]
    assert list(found.kl_after[:3]) == sorted(found.kl_after[:3])


def test_units_that_add_nothing_go_first(dead: Path, tmp_path: Path) -> None:
    whole = sum(p.numel() for p in teacher_of().parameters())
    narrow = whole - LAYERS * 3 * 32 * 32
    found = made(dead, tmp_path / "out", at_most=f"{narrow}", positions=400)
    best = found.candidates[0]
    assert (best.shape.layers, best.shape.hidden, best.shape.groups, best.shape.mlp) == (LAYERS, 32, 2, 32)
    assert found.parameters == best.size == narrow
    assert found.teacher_kl is not None
    assert best.kl == pytest.approx(found.teacher_kl, abs=1e-4)
    assert found.candidates[1].kl is not None
    assert found.candidates[1].kl > best.kl + 0.01


def test_what_is_written_fits(dead: Path, tmp_path: Path) -> None:
    """In bytes, of files, at each type; a quantised budget allows more."""
    for dtype, quantize, limit in (
        ("float32", "none", 130_000),
        ("bfloat16", "none", 80_000),
        ("float32", "int4", 40_000),
    ):
        out = tmp_path / f"{dtype}-{quantize}"
        found = made(dead, out, at_most=f"{limit / 1000:g}kB", dtype=dtype, quantize=quantize, positions=100)
        files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert found.bytes == files
        if quantize == "none":
            assert 0.7 * limit < files <= limit
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == dtype
        if quantize == "int4":
            assert files > limit
            assert config["intermediate_size"] % 32 == config["hidden_size"] % 32 == 0


def test_without_a_cache_it_is_a_config(tmp_path: Path) -> None:
    model = teacher_of(vocab_size=290)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer_of().save_pretrained(tmp_path / "teacher")
    given = ["student", "--teacher", str(tmp_path / "teacher"), "--at-most", "40k", "--out", str(tmp_path / "out")]
    assert main([*given, "--json"]) == 0
    config = load_transformers().AutoConfig.from_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    made = make_student(tmp_path / "out", None)
    assert 28_000 < made.student.parameters_and_bytes[0] <= 40_000
    assert made.tokenizer is not None
    assert config.vocab_size == 290
    assert config.num_hidden_layers < LAYERS
    assert config.hidden_size < 32
    found = student(tmp_path / "teacher", tmp_path / "other", StudentSettings(at_most="100kB"))
    assert found.kind == NEW
    assert found.parameters == make_student(tmp_path / "other", None).student.parameters_and_bytes[0]
    assert found.bytes <= 100_000


def test_one_layer_in_three(idle: Path, tmp_path: Path) -> None:
    found = student(idle / "teacher", tmp_path / "out", StudentSettings(drop_every=3))
    assert found.layers == (0, 2, 3)
    teacher = load_transformers().AutoModelForCausalLM.from_pretrained(idle / "teacher")
    keep_layers(teacher, [0, 2, 3])
    teacher.save_pretrained(tmp_path / "by hand")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "by hand" / name).read_bytes(), name
    measured = made(idle, tmp_path / "measured", drop_every=3, positions=400)
    assert measured.candidates[0].kl > 0.1  # type: ignore[operator]
    assert "KL from the teacher" in measured.text


def test_a_model_of_another_family_loses_layers(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral", num_hidden_layers=3)
    student(tmp_path / "mixtral", tmp_path / "out", StudentSettings(drop_every=3))
    pruned = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(pruned.model.layers) == 2
    with pytest.raises(TrainError, match="got a mixture of experts"):
        student(tmp_path / "mixtral", tmp_path / "other", StudentSettings(at_most="50k"))
    assert not (tmp_path / "other").exists()


def test_the_command(idle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["student", "--teacher", str(idle / "teacher"), "--cache", str(idle / "cache"), "--at-most", "50k"]
    given += ["--positions", "100", "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "layers in the order of removal (KL after it): 3 (" in text
    assert "\nchosen " in text
    assert "pruned copy, 0.0" in text
    assert main([*given, "--out", str(tmp_path / "out")]) == 1
    assert "out', which exists; expected a new folder." in capsys.readouterr().err
    assert main([*given, "--out", str(tmp_path / "again"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["event"] == "done"
    assert found["student"] == str(tmp_path / "again")
    assert found["candidates"][0]["shape"].keys() == {"layers", "hidden", "groups", "mlp"}
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert a == b


@pytest.mark.parametrize(
    ("text", "limit", "in_bytes"),
    [("80M", 80_000_000, False), ("1.5G", 1_500_000_000, False), ("60k", 60_000, False), ("60K", 60_000, False),
     ("60 MB", 60_000_000, True), ("900KB", 900_000, True), ("10TB", 10**13, True)],
)  # fmt: skip
def test_budgets_as_people_write_them(text: str, limit: int, in_bytes: bool) -> None:
    budget = read_budget(text)
    assert (budget.limit, budget.in_bytes) == (limit, in_bytes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at_most": "80 parrots"}, "at_most: got '80 parrots'; expected a number of parameters, such as 80M or"),
        ({"at_most": "0"}, "at_most: got '0'; expected"),
        ({"at_most": "2k"}, r"at_most: got 2k; expected at least 2,\d+ parameters, .* \(layers 1, hidden 8,"),
        ({"at_most": "2kB"}, r"at_most: got 2kB; expected at least \d+.* kB, "),
        ({"at_most": "60M"}, "at_most: got 60M; expected less than the teacher's 52,\\d+ parameters. Use the teacher"),
        ({}, "at_most, drop_every: got neither; expected one of them"),
        ({"at_most": "40k", "drop_every": 3}, "at_most, drop_every: got both"),
        ({"drop_every": 1}, "drop_every: got 1; expected 2 or more"),
        ({"drop_every": 12}, "drop_every: got 12; expected 2 or more, such that one of teacher's 5 layers"),
        ({"drop_every": 3, "quantize": "int8"}, "quantize: got 'int8' with drop_every"),
        ({"at_most": "40k", "quantize": "int8"}, "quantize: got 'int8' with 40k parameters"),
        ({"at_most": "40k", "positions": 0}, "positions: got 0"),
    ],
)
def test_refused(settings: Any, message: str, idle: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        made(idle, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_refused_caches(idle: Path, dead: Path, tmp_path: Path) -> None:
    small = StudentSettings(at_most="40k", device="cpu", positions=100)
    with pytest.raises(TrainError, match=r"has a KL divergence of \d.* nats; expected its own answers"):
        student(idle / "teacher", tmp_path / "out", small, cache=dead / "cache")
    teacher_of(vocab_size=128).save_pretrained(tmp_path / "wide")
    with pytest.raises(TrainError, match="with a vocabulary of 96; expected 128, as wide has"):
        student(tmp_path / "wide", tmp_path / "out", small, cache=idle / "cache")
    make_image_cache(tmp_path / "images")
    with pytest.raises(TrainError, match="which is of examples; expected one of text"):
        student(idle / "teacher", tmp_path / "out", small, cache=tmp_path / "images")
    teacher_of(intermediate_size=20).save_pretrained(tmp_path / "odd")
    with pytest.raises(TrainError, match=r"quantize: got int4 for model.layers.0.*20 inputs; expected a multiple of"):
        student(tmp_path / "odd", tmp_path / "out", StudentSettings(at_most="60kB", quantize="int4"))
    assert not (tmp_path / "out").exists()
