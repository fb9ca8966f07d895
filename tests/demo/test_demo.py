"""The demo: its pure parts, and all of it on a small model of transformers."""

import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

import torch
from hf_cases import model_of, tokenizer_of
from torch import Tensor

from fastkd.cache import CacheError, open_cache, verify_cache
from fastkd.cache.manifest import shard_key
from fastkd.cli import main as cli
from fastkd.demo import deployed, language, run_demo, students, teacher
from fastkd.demo.artifacts import cached_result, load_result, save_result
from fastkd.demo.corpus import language_reference, package_sources, save_windows, token_windows
from fastkd.demo.job import PRESETS, Job
from fastkd.demo.page import commands, options
from fastkd.demo.results import Target, targets_text
from fastkd.demo.stages import Stages, flip_a_bit
from fastkd.errors import DataError
from fastkd.models.hub import load_transformers
from fastkd.models.pruned import keep_layers, kept_layers
from fastkd.models.tokenizers import load_tokenizer
from fastkd.report import render
from fastkd.settings import CaptureSettings, DemoSettings
from fastkd.teachers.hf import HFTeacher
from fastkd.train.trainer import Trainer
from fastkd.utils.signals import Stop, Stopped

LAYERS, WINDOW, TRAIN, HELD_OUT = 5, 32, 10, 5
BARE = 4 * 5  # windows that the bare teacher is timed on
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "user", "system", "0123", "4567"]
TEXT = " ".join(np.random.default_rng(0).choice(WORDS, 1200).tolist())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder: of random weights, but sure of what it says."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    words = tokenizer_of()
    kind = {"num_hidden_layers": LAYERS, "tie_word_embeddings": True, "initializer_range": 0.3}
    model = model_of("llama", vocab_size=len(words), **kind)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def text(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "language_reference", lambda: iter([TEXT]))
    in_int8 = "test_the_student_is_deployed_in_int8"  # which takes as long as all the rest
    plain(monkeypatch, drawings=request.node.name in ("test_demo", in_int8), int8=request.node.name == in_int8)


def plain(patch: pytest.MonkeyPatch, *, drawings: bool = False, int8: bool = False) -> None:
    """Pages without drawings, and the student deployed as the file that it is in."""
    if not drawings:
        patch.setattr(render, "svg", lambda chart: "<svg></svg>")
    if not int8:
        patch.setattr(deployed, "TO", "safetensors")
        patch.setattr(deployed, "QUANTIZE", "none")


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> DemoSettings:
    return small(tmp_path / "demo", tiny)


def small(out: Path, tiny: Path) -> DemoSettings:
    return DemoSettings(
        out=out, teacher=tiny, window=WINDOW, train_windows=TRAIN, held_out=HELD_OUT, shard_windows=4, k=6, draws=4,
        steps=20, rate=1e-3, alpha=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo was run, whole."""
    out = tmp_path_factory.mktemp("whole") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "language_reference", lambda: iter([TEXT]))
        plain(patch)
        run_demo(small(out, tiny))
    return out


@pytest.fixture
def again(settings: DemoSettings, whole: Path) -> DemoSettings:
    """Settings for a copy of that folder."""
    shutil.copytree(whole, settings.out)
    return settings


@contextlib.contextmanager
def asked(dies_after: int | None = None) -> Iterator[list[int]]:
    """The positions that the teacher is run on, batch by batch; it dies where it is told to."""
    seen: list[int] = []
    whole = HFTeacher.__call__

    def call(self: HFTeacher, inputs: Tensor) -> Any:
        if dies_after is not None and len(seen) >= dies_after:
            raise KeyboardInterrupt
        seen.append(inputs.numel())
        return whole(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFTeacher, "__call__", call)
        yield seen


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def shards(out: Path) -> dict[int, bytes]:
    return {int(path.name.split(".")[0]): path.read_bytes() for path in (out / "cache").glob("shards/*")}


def contents(out: Path) -> list[str]:
    """The hash of what each shard holds."""
    found: list[str] = open_cache(out / "cache").manifest.column("content_sha256").to_pylist()
    return found


def evaluations(out: Path) -> dict[str, Any]:
    """What was measured of each student, but for the time that it took."""
    names = ("damaged", "healed", "healed/control", "soft")
    found = {name: json.loads((out / name / "evaluation.json").read_text()) for name in names}
    return {name: {k: v for k, v in f.items() if k not in ("seconds", "sha256")} for name, f in found.items()}


# The parts


def test_windows_are_chosen_without_overlap(tiny: Path) -> None:
    words = load_tokenizer(tiny)
    ids = words.encode(TEXT)
    found = token_windows([TEXT], words, length=16, count=20, seed=0)
    assert found.shape == (20, 16)
    places = [i for i in range(0, len(ids) - 15, 16) for row in found.tolist() if ids[i : i + 16] == row]
    assert len(set(places)) >= 20
    assert (found == token_windows([TEXT], words, length=16, count=20, seed=0)).all()
    assert (found != token_windows([TEXT], words, length=16, count=20, seed=1)).any()
    # of several texts no more are read than it takes
    few = iter([TEXT[:60], TEXT[60:900], "last"])
    assert len(token_windows(few, words, length=16, count=5, seed=0)) == 5
    assert next(few) == "last"
    for wanted in (0, len(ids) // 16 + 1):
        with pytest.raises(DataError, match="windows: got"):
            token_windows([TEXT], words, length=16, count=wanted, seed=0)


def test_windows_are_rows_of_parquet(tmp_path: Path) -> None:
    path, windows = tmp_path / "w.parquet", np.arange(12, dtype=np.int32).reshape(3, 4)
    save_windows(path, windows)
    before = path.read_bytes()
    path.write_bytes(before[:-9])
    save_windows(path, windows)
    assert path.read_bytes() == before
    assert pq.read_table(path).to_pylist() == [{"input_ids": row} for row in windows.tolist()]
    save_windows(path, windows + 1)
    assert pq.read_table(path).to_pylist()[0] == {"input_ids": [1, 2, 3, 4]}


def test_no_paragraph_stands_twice_in_the_text() -> None:
    (found,) = language_reference()
    paragraphs = [" ".join(p.split()) for p in found.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_source_files_are_read_each_once(tmp_path: Path) -> None:
    for name, data in {"a.py": b"x = 1\n", "b/c.py": b"y = 2\n", "b/same.py": b"x = 1\n", "latin.py": b"# \xe4\n",
                       "empty.py": b"", "no.txt": b"z\n"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    orders = {tuple(package_sources(seed, tmp_path)) for seed in range(8)}
    assert orders == {("x = 1\n", "y = 2\n"), ("y = 2\n", "x = 1\n")}


def test_the_packages_of_this_python_are_a_corpus(tiny: Path) -> None:
    found = token_windows(package_sources(0), load_tokenizer(tiny), length=64, count=30, seed=0)
    assert found.shape == (30, 64)
    assert len({tuple(row) for row in found.tolist()}) == 30


def test_every_fifth_layer_goes() -> None:
    assert kept_layers(10, 5) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert len(kept_layers(30, 5)) == 24


def test_sizes_are_the_scales_unless_they_are_set(settings: DemoSettings) -> None:
    assert Job(DemoSettings(), Stages()).sizes == PRESETS["cpu"]
    assert Job(DemoSettings(scale="gpu", steps=3), Stages()).sizes == PRESETS["gpu"]._replace(steps=3)
    assert Job(settings, Stages()).sizes.windows == TRAIN + HELD_OUT


def test_what_is_made_once_is_kept_for_the_same_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert load_result(path, {"a": (1, 2)}) is None
    assert cached_result(path, {"a": (1, 2)}, lambda: {"b": (3,)}) == {"b": [3]}
    assert cached_result(path, {"a": (1, 2)}, lambda: pytest.fail("made again")) == {"b": [3]}
    assert load_result(path, {"a": (1, 3)}) is None
    for damaged in ("{", "[]", '{"of": {"a": [1, 2]}, "found": 3}'):
        path.write_text(damaged)
        assert load_result(path, {"a": (1, 2)}) is None
    assert save_result(path, {}, {"c": Path("d")}) == {"c": "d"}


def test_options_are_what_differs() -> None:
    assert options(CaptureSettings()) == []
    assert options(CaptureSettings(k=5, held_out=0.25)) == ["--k", "5", "--held-out", "0.25"]


def test_a_figure_beyond_its_limit_is_missed() -> None:
    good, bad = Target("a", 1.0, 1.0, "1", "1"), Target("b", 1.01, 1.0, "1.01", "1")
    assert [line.split()[-1] for line in targets_text([good, bad])[1:]] == ["ok", "MISSED"]


def test_layers_that_stay_are_the_models_own(tmp_path: Path) -> None:
    model = model_of("llama", num_hidden_layers=LAYERS)
    third = model.base_model.layers[3]
    keep_layers(model, kept_layers(LAYERS, 5))
    assert len(model.base_model.layers) == 4
    assert model.base_model.layers[2] is third
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = model(tokens).logits
        # with a key-value cache, which looks for layers by their numbers
        begun = model(tokens[:, :8], use_cache=True)
        rest = model(tokens[:, 8:], past_key_values=begun.past_key_values).logits
        torch.testing.assert_close(rest, logits[:, 8:], atol=1e-5, rtol=1e-4)
        model.save_pretrained(tmp_path)
        read = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(read(tokens).logits, logits)


# All of it


def test_demo(settings: DemoSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    models = []
    load = teacher.load

    def loads(*args: Any) -> Any:
        loaded = load(*args)
        models.append(weakref.ref(loaded.teacher.model))  # type: ignore[attr-defined]
        return loaded

    monkeypatch.setattr(teacher, "load", loads)
    trained = students.train

    def train(*args: Any, **more: Any) -> Any:
        gc.collect()
        assert models[0]() is None, "the teacher is still there"
        return trained(*args, **more)

    monkeypatch.setattr(students, "train", train)
    with asked() as seen:
        done = run_demo(settings)
    report, out = done.report, settings.out
    assert json.loads((out / "report.json").read_text()) == report
    assert report["captured_now"] == report["positions"] == (TRAIN + HELD_OUT) * WINDOW
    # once for the cache; and a batch of four windows, once to warm up, twice before it and twice after it
    assert sum(seen) == (TRAIN + HELD_OUT + BARE) * WINDOW
    assert open_cache(out / "cache").sealed
    means = {name: found["kl_bucket"]["mean"] for name, found in report["students"].items()}
    assert means["healed"] < means["healed, control"]
    assert means["soft"] < means["healed, control"]
    assert all(len(e["student"]["counts"]) == HELD_OUT for e in evaluations(out).values())
    for name in ("healed", "healed/control", "soft"):
        assert not (out / name / "checkpoints").exists()
        load_transformers().AutoModelForCausalLM.from_pretrained(out / name / "student")
    assert {f["name"] for f in report["figures"]} == {
        "capture over the bare teacher",
        "share of training that waited for data",
        "a step over one of cross-entropy alone",
        "bytes a position",
    }
    assert all(f["value"] > 0 for f in report["figures"] if not f["name"].startswith("share"))
    said = capfd.readouterr().err
    for words in ("k = 6", "Bytes per position, by array", "shard 1, array"):
        assert words in said
    for words in ("the teacher ran on 480", "damaged", "healed - control", "soft - control", "report.html"):
        assert words in done.text
    page = (out / "report.html").read_text()
    for words in (
        "Completions",
        "break-even",
        "Targets",
        "Verification",
        "The same by hand",
        "fastkd capture",
        "--control",
    ):
        assert words in page
    assert page.count('class="prefix"') == HELD_OUT
    assert "safetensors" in page
    row = report["deployed"]["rows"][1]
    assert row["quality"]["windows"] == HELD_OUT
    assert f"deployed: {row['name']} in {row['runtime']}" in done.text
    assert verify_cache(out / "cache").ok


@pytest.mark.soak
def test_the_student_is_deployed_in_int8(settings: DemoSettings) -> None:
    """As a person sees it, with drawings; the digits' student is deployed so in `make test`."""
    done = run_demo(settings)
    report, out = done.report, settings.out
    page = (out / "report.html").read_text()
    assert "onnx int8" in page
    row = report["deployed"]["rows"][1]
    assert row["quality"]["windows"] == HELD_OUT
    assert row["ratios"]["bytes"] < 1  # of a tiny model, most is the graph
    assert abs(row["quality"]["cost"]["mean"]) < 0.1
    assert f"deployed: onnx int8 in {row['runtime']}" in done.text
    assert "onnx int8" in (out / "deploy.html").read_text()


def test_a_second_run_never_runs_the_teacher(
    again: DemoSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = json.loads((again.out / "report.json").read_text())
    monkeypatch.setattr(teacher, "load", lambda *_: pytest.fail("the teacher is loaded"))
    monkeypatch.setattr(students, "train", lambda *_, **__: pytest.fail("a student is trained"))
    capfd.readouterr()
    done = run_demo(again)
    said = capfd.readouterr().err
    for words in ("the cache is complete, the teacher is not loaded", "healed is reused", "onnx-int8 is reused"):
        assert words in said
    assert "the teacher did not run" in done.text
    for same in ("students", "differences", "figures", "bytes", "deployed"):
        assert done.report[same] == first[same]


@pytest.mark.parametrize("committed", [0, 1, 2, 3, 4])
def test_an_interrupted_capture_goes_on(settings: DemoSettings, whole: Path, committed: int) -> None:
    with pytest.raises(KeyboardInterrupt), asked(dies_after=3 + committed):
        run_demo(settings)
    # a shard that the teacher was done with may still have waited to be written
    found = shards(settings.out)
    assert set(found) <= set(range(committed))
    # the rest of the demo is another test's
    with asked() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "verify_before_training", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(settings)
    # ten windows to train on and five held out, four a shard
    left = sum((4, 4, 2, 4, 1)[shard] for shard in found) * WINDOW
    assert sum(seen) == (TRAIN + HELD_OUT + BARE) * WINDOW - left
    assert contents(settings.out) == contents(whole)
    assert found.items() <= shards(settings.out).items()


@pytest.mark.parametrize("dies_in", ["held_out_windows", "completions_of"])
def test_a_teacher_that_is_interrupted_later_is_asked_for_the_rest(
    settings: DemoSettings, whole: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(teacher, dies_in, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(settings)
    monkeypatch.setattr(language, "verify_before_training", interrupted)
    with asked() as seen, pytest.raises(KeyboardInterrupt):
        run_demo(settings)
    assert sum(seen) == (BARE + HELD_OUT) * WINDOW  # nothing for the cache
    assert contents(settings.out) == contents(whole)


@pytest.mark.parametrize(
    "run_of",
    [pytest.param("healed", marks=pytest.mark.soak), "healed/control", pytest.param("soft", marks=pytest.mark.soak)],
)
def test_a_training_that_is_stopped_goes_on(again: DemoSettings, whole: Path, run_of: str) -> None:
    for name in ("healed", "soft"):
        shutil.rmtree(again.out / name)
    stop, take = Stop(), Trainer._take

    def takes(self: Trainer, *args: Any, **more: Any) -> None:
        take(self, *args, **more)
        if self._out == again.out / run_of and self.step == 7:
            stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_take", takes)
        with pytest.raises(Stopped):
            run_demo(again, stop)
    assert (again.out / run_of / "checkpoints").exists()
    run_demo(again)
    assert json.loads((again.out / run_of / "run.json").read_text())["report"]["resumed"] == 7
    assert evaluations(again.out) == evaluations(whole)


@pytest.mark.parametrize(
    "dies_in", ["evaluate_untrained", "train_student", "step_ratio", "student_completions", "make_report"]
)
def test_interrupted_anywhere_it_goes_on(
    again: DemoSettings, whole: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    for path in [*again.out.glob("completions-*"), again.out / "step.json"]:
        path.unlink()
    shutil.rmtree(again.out / "damaged")
    shutil.rmtree(again.out / "soft")
    with monkeypatch.context() as patch:
        patch.setattr(language if dies_in == "make_report" else students, dies_in, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(again)
    run_demo(again)
    assert evaluations(again.out) == evaluations(whole)


def test_damage_is_named_and_mended(again: DemoSettings, whole: Path) -> None:
    path = again.out / "cache" / shard_key(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"shard 1, .*Nothing was trained. Delete") as error:
        run_demo(again)
    assert "shard 0" not in str(error.value)
    # as the message says
    path.unlink()
    (again.out / "cache" / "manifest.parquet").unlink()
    with asked() as seen:
        mended = run_demo(again)
    assert mended.report["captured_now"] == 4 * WINDOW
    assert sum(seen) == (4 + BARE) * WINDOW
    assert contents(again.out) == contents(whole)


def test_a_shard_that_a_sealed_cache_lacks(again: DemoSettings) -> None:
    (again.out / "cache" / shard_key(2)).unlink()
    with pytest.raises(CacheError, match=r"Nothing was trained"):
        run_demo(again)


def test_a_cache_of_other_settings_is_refused(again: DemoSettings) -> None:
    before = shards(again.out)
    with pytest.raises(CacheError, match="k: 6 and 7"):
        run_demo(replace(again, k=7))
    with pytest.raises(CacheError, match="data: "):
        run_demo(replace(again, seed=1))
    assert shards(again.out) == before
    run_demo(again)


def test_training_settings_leave_the_cache_alone(again: DemoSettings) -> None:
    with asked(dies_after=0):
        report = run_demo(replace(again, alpha=0.5, steps=3, cut=2)).report
    assert report["captured_now"] == 0
    metrics = (again.out / "healed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics if "loss" in line] == [1, 2, 3]


def test_the_commands_do_what_the_demo_did(
    again: DemoSettings, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capture, *_, soft, report, _, deploy = made = commands(Job(again, Stages()))
    pruned = next(command for command in made if command[1] == "student")
    assert cli.main([*pruned[1:-1], str(tmp_path / "pruned")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (whole / "cut-5" / name).read_bytes(), name
    assert cli.main([*capture[1:], "--json"]) == 0
    done = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (done["complete"], done["positions_captured"]) == (True, 0)
    shutil.rmtree(again.out / "soft")
    assert cli.main(soft[1:]) == 0
    assert evaluations(again.out) == evaluations(whole)
    assert cli.main(report[1:]) == 0
    assert cli.main(deploy[1:]) == 0


def test_the_corpus_of_a_gpu(settings: DemoSettings) -> None:
    """Its sizes are for a GPU, its code is not."""
    job = Job(replace(settings, scale="gpu"), Stages())
    language.prepare_data(job)
    rows = pq.read_table(job.windows).to_pylist()
    assert {len(row["input_ids"]) for row in rows} == {WINDOW}
    assert len(rows) == TRAIN + HELD_OUT
    assert options(job.model) == ["--dtype", "bfloat16"]


def test_the_flipped_byte_is_one_bit_of_one_file(whole: Path, tmp_path: Path) -> None:
    which, problems = flip_a_bit(whole / "cache", tmp_path / "copy")
    assert "1.zarr.zip" in which
    assert "shard 1" in problems[0]
    changed = []
    for path in sorted((whole / "cache").rglob("*")):
        if path.is_file():
            ours, theirs = path.read_bytes(), (tmp_path / "copy" / path.relative_to(whole / "cache")).read_bytes()
            changed += [(path.name, a ^ b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert changed == [("1.zarr.zip", 1)]


def test_command(again: DemoSettings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = [
        f"--{f.name.replace('_', '-')}={value}" for f in fields(again) if (value := getattr(again, f.name)) is not None
    ]
    assert cli.main(["demo", *args, "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["settings"]["steps"] == 20
    assert "train healed: 20 steps of 64 positions" in captured.err

    def stops(settings: DemoSettings, stop: Stop) -> Any:
        raise Stopped

    monkeypatch.setattr("fastkd.demo.run_demo", stops)
    assert cli.main(["demo"]) == 75
    assert "Run the same command again" in capfd.readouterr().err


def test_help_names_every_setting(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    out = capfd.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in out for field in fields(DemoSettings))
