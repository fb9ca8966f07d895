"""`fastkd export` and `fastkd deploy-report` with the format safetensors: what is written, refused and measured."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_cases
from deploy_cases import classifier_run, next_ids, text_run
from forked import Forked, code
from hf_cases import VOCAB, model_of
from train_cases import CAPTURE, Tiny, documents, make_cache

import fastkd
import fastkd.deploy.formats.safetensors as safetensors
from fastkd.cache import Cache, open_cache
from fastkd.cli import main as cli
from fastkd.deploy import deploy_report, export
from fastkd.deploy.calibration import Calibration
from fastkd.deploy.exported import FILE, read_exported
from fastkd.deploy.formats import find, names
from fastkd.deploy.measure import Measured, Subject, measure
from fastkd.deploy.model import load_deployable
from fastkd.deploy.quality import FILE as EVALUATION
from fastkd.deploy.quality import load_quality
from fastkd.deploy.runtime import Runtime, greedy, logits_of
from fastkd.deploy.segments import segments_of
from fastkd.errors import ExportError, StreamError
from fastkd.evaluate import evaluate
from fastkd.stream.cached import CachedSource

ONE = {"threads": 1}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report without the processes that measure, which take seconds to start."""
    same = Measured("PyTorch", 0.5, 0.25, 2**20, {"prefill": 1.0, "decode": 1.0, "memory": 1.0})
    monkeypatch.setattr("fastkd.deploy.api.measure", lambda model, exports, *_, **__: [same] * (1 + len(exports)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cache]:
    return text_run(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cache]:
    return classifier_run(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def exported(text: tuple[Path, Cache], tmp_path_factory: pytest.TempPathFactory) -> Path:
    student, cache = text
    out = tmp_path_factory.mktemp("exported") / "plain"
    report = export(student, "safetensors", out, cache=cache, **ONE)
    assert report.status == 0
    return out


def test_an_export_is_the_student(text: tuple[Path, Cache], exported: Path) -> None:
    """Its logits are PyTorch's, on other batches and lengths than the example's, and so are its measures."""
    student, cache = text
    model = load_deployable(student)
    found = read_exported(exported)
    assert (found.to, found.quantize, found.kind, found.vocab_size, found.max_positions) == (
        "safetensors", "none", "text", VOCAB, 64,
    )  # fmt: skip
    assert found.bytes == sum((exported / name).stat().st_size for name in found.files)
    runtime = found.runtime(1)
    assert isinstance(runtime, Runtime)
    ids = torch.from_numpy(next_ids(21, VOCAB)).reshape(3, 7)
    with torch.no_grad():
        assert np.array_equal(runtime.logits(ids.numpy()), model.plain(ids).numpy())
    quality = load_quality(exported)
    assert quality is not None
    assert quality.cost == (0.0, 0.0)
    assert quality.exported.intervals()["student_agreement"].mean == 1.0
    plain = evaluate(lambda batch: model.plain(batch.input_ids).flatten(0, 1)[batch.targets.index], cache)
    assert quality.exported.student.sums["kl_bucket"] == pytest.approx(plain.student.sums["kl_bucket"], rel=1e-4)


def test_greedy_completion_is_that_of_transformers(text: tuple[Path, Cache], exported: Path) -> None:
    model = load_deployable(text[0]).model
    prompt = next_ids(5, VOCAB).tolist()
    expected = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0
    )[0, 5:].tolist()
    runtime = read_exported(exported).runtime(1)
    assert greedy(runtime, prompt, 32) == expected
    assert greedy(runtime, prompt, 32) == expected  # a prefill forgets the sequence before
    assert greedy(runtime, prompt, 32, end=expected[3]) == expected[: expected.index(expected[3]) + 1]


def test_a_module_without_a_cache_of_keys_runs_again_for_each_token() -> None:
    model = Tiny(seed=1)
    runtime = safetensors.TorchRuntime(model, torch.get_num_threads())
    sequence = next_ids(4, VOCAB).tolist()
    for token in greedy(runtime, sequence, 5):
        with torch.no_grad():
            output = model(torch.tensor([sequence]))
        assert token == int((output.states @ output.lm_head.weight.T)[0, -1].argmax())
        sequence = [*sequence, token]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_each_document_runs_alone_and_without_pads(text: tuple[Path, Cache], layout: str) -> None:
    """The logits of a micro-batch are those of its documents, wherever they lie, also where some positions do not
    count."""
    seen = []

    class Spy:
        name = "spy"

        def logits(self, inputs: Any) -> Any:
            seen.append(inputs.shape)
            return np.stack([inputs, np.arange(inputs.shape[1])[None]], -1).astype(np.float32)

    source = CachedSource(text[1], batch_size=9, micro_tokens=None, layout=layout)
    (batch, *_) = next(iter(source.steps(epochs=1))).micro_batches
    index = batch.targets.index
    answer = logits_of(Spy())(batch)  # type: ignore[arg-type]
    assert torch.equal(answer[:, 0].long(), batch.input_ids.flatten()[index])
    assert torch.equal(answer[:, 1].long(), batch.position_ids.flatten()[index])
    assert len(seen) > 2
    assert all(shape[0] == 1 for shape in seen)
    total = sum(rows.shape[1] for rows, _ in segments_of(batch))
    assert total == batch.positions
    source.close()


def test_a_document_longer_than_the_student_is_refused(text: tuple[Path, Cache]) -> None:
    runtime = safetensors.TorchRuntime(load_deployable(text[0]).model, torch.get_num_threads())
    with pytest.raises(ExportError, match=r"a document of \d+ tokens; expected at most 3, which the student takes"):
        evaluate(logits_of(runtime, longest=3), text[1])


def test_calibration_is_of_the_training_split_and_bounded(text: tuple[Path, Cache]) -> None:
    some = list(Calibration(text[1], positions=20))
    again = list(Calibration(text[1], positions=20))
    assert all(torch.equal(a, b) for a, b in zip(some, again, strict=True))
    assert 20 <= sum(x.numel() for x in some) < 20 + 16
    assert all(x.shape[0] == 1 for x in some)
    everything = [x.tolist() for x in Calibration(text[1], positions=10**6)]
    source = CachedSource(text[1], batch_size=1, shuffle=False)
    trained = [
        rows.tolist() for step in source.steps(epochs=1) for b in step.micro_batches for rows, _ in segments_of(b)
    ]
    assert sorted(map(str, everything)) == sorted(map(str, trained))


def test_a_classifier_from_a_cache_of_examples(digits: tuple[Path, Cache], tmp_path: Path) -> None:
    """Its run knows what made it; the page has one latency, and no KV cache."""
    student, cache = digits
    data = vision_cases.examples()
    report = export(student, "safetensors", tmp_path / "out", cache=cache, data=data, **ONE)
    assert report.quality is not None
    assert report.quality.cost.mean == 0.0
    assert report.quality.exported.intervals()["student_agreement"].mean == 1.0
    found = deploy_report(student, [tmp_path / "out"], data=data, turns=1, **ONE)
    assert found.prompt == 0
    assert "one example" in Path(found.page).read_text()
    module = load_deployable(student, examples=data.first()).model
    for source in (module, f"trained:deploy_cases:net@{student}"):
        assert load_deployable(source, examples=data.first()).vocab_size == vision_cases.CLASSES
    with pytest.raises(ExportError, match="a torch module that was given"):
        export(module, "safetensors", tmp_path / "other", data=data)
    assert not (tmp_path / "other").exists()


def test_the_report_measures_all_in_one_run(
    text: tuple[Path, Cache], exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command: a row for PyTorch and for each export, in JSON, as text, and on a page of one file."""
    student, cache = text
    page = tmp_path / "pages" / "page.html"
    place = cache.store.describe()
    words = ["deploy-report", str(student), str(exported), "--threads", "1", "--out", str(page)]
    assert cli.main([*words, "--json", "--cache", place, "--at-most", "0.5"]) == 0
    found = json.loads(capfd.readouterr().out)
    first, second = found["rows"]
    assert (first["name"], second["name"]) == ("PyTorch", "safetensors")
    assert set(second["ratios"]) == {"bytes", "prefill", "decode", "memory"}
    assert first["ratios"] == {"bytes": 1.0, "prefill": 1.0, "decode": 1.0, "memory": 1.0}
    assert second["quality"]["cost"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert set(second["quality"]["exported"]) >= {"kl_bucket", "agreement", "student_agreement", "cross_entropy"}
    html = page.read_text()
    assert "Quality by size" in html
    assert "Quality by latency" in html
    assert f"fastkd deploy-report {student}" in html
    assert "://" not in html
    # without a cache, what the export evaluated
    assert cli.main(words) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["size", "ratio"]
    assert lines[1].startswith("PyTorch")
    assert lines[-1] == str(page)


@pytest.mark.parametrize("kind", ["text", pytest.param("examples", marks=pytest.mark.soak)])
def test_latency_and_memory_are_of_processes_of_their_own(
    kind: str, text: tuple[Path, Cache], digits: tuple[Path, Cache], exported: Path, tmp_path: Path
) -> None:
    if kind == "text":
        model, folder = load_deployable(text[0]), exported
    else:
        data = vision_cases.examples()
        folder = tmp_path / "out"
        export(digits[0], "safetensors", folder, data=data)
        model = load_deployable(load_deployable(digits[0], examples=data.first()).model, examples=data.first())
    first, second = measure(Subject.of(model), [read_exported(folder)], 1, turns=1)
    assert first.runtime == second.runtime == f"PyTorch {torch.__version__}"
    assert first.ratios == dict.fromkeys(first.ratios, 1.0)
    assert second.ratios["prefill"] == second.prefill / first.prefill
    assert (first.decode is None) == (kind == "examples")
    if first.memory is not None:
        assert 0 < first.memory < 2**30


@pytest.mark.soak
def test_a_process_that_ends_early_is_named(text: tuple[Path, Cache], exported: Path, tmp_path: Path) -> None:
    gone = replace(read_exported(exported), folder=tmp_path / "gone")
    with pytest.raises(ExportError, match=r"^[^ ]*gone: got no fastkd_export.json; expected a folder"):
        measure(Subject.of(load_deployable(text[0])), [gone], 1, turns=1)


class Worse:
    """A format that writes a student with noise on its weights, for one that costs something."""

    EXTRA, PACKAGES, QUANTIZE = "", (), ("none", "int8")
    check = staticmethod(safetensors.check)
    load = staticmethod(safetensors.load)

    @staticmethod
    def write(model: Any, folder: Path, quantize: str, calibration: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        other = model_of("llama", max_position_embeddings=64)
        other.load_state_dict({n: t + 0.3 * t.std() * torch.randn_like(t) for n, t in model.model.state_dict().items()})
        return safetensors.write(replace(model, model=other), folder, "none", calibration) | {"notes": ["noisy."]}


def test_what_costs_more_than_allowed_fails(
    text: tuple[Path, Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1 and one sentence; the export is kept, with its evaluation."""
    student, cache = text
    monkeypatch.setattr("fastkd.deploy.api.find", lambda name: Worse)
    out, place = tmp_path / "out", cache.store.describe()
    words = ["export", str(student), "--to", "safetensors", "--quantize", "int8", "--cache", place, "--threads", "1"]
    assert cli.main([*words, "--out", str(out), "--at-most", "1e-6"]) == 1
    said = capfd.readouterr().out
    assert "note: noisy." in said
    assert "nats higher than the unquantised student's; expected at most 1e-06." in said
    quality = load_quality(out)
    assert quality is not None
    cost = quality.cost.mean
    assert cost > 1e-4
    difference = quality.exported.student.sums["kl_bucket"].sum() - quality.student.student.sums["kl_bucket"].sum()
    assert cost == pytest.approx(difference / quality.student.count)
    assert quality.exported.intervals()["student_agreement"].mean < 1.0
    assert cli.main([*words, "--out", str(tmp_path / "again"), "--at-most", str(2 * cost)]) == 0
    capfd.readouterr()
    folders = [str(out), str(tmp_path / "again")]
    report = ["deploy-report", str(student), *folders, "--threads", "1", "--at-most", str(cost / 2)]
    assert cli.main(report) == 1
    said = capfd.readouterr().out
    assert "safetensors int8, again" in said
    assert f"expected at most {cost / 2:g}" in said


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such format": ({"to": "tflite"}, r"to: got 'tflite'; expected one of .*safetensors"),
    "a quantisation": ({"quantize": "int4"}, r"quantize: got 'int4' with the format safetensors; expected one of none"),
    "no cache": ({"at_most": 0.1}, "at_most: got 0.1 without a cache"),
    "not a number": ({"at_most": float("nan")}, "at_most: got nan; expected a number of nats"),
    "threads": ({"threads": 0}, "threads: got 0; expected an integer from 1 on"),
    "a setting": ({"bits": 4}, "settings: got 'bits'; expected some of"),
    "no student": ({"student": "/nowhere/student"}, "/nowhere/student: there is no such folder"),
    "no factory": ({"student": "trained:x"}, "expected trained:module:factory@RUN/student"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(case: str, text: tuple[Path, Cache], tmp_path: Path) -> None:
    changes, said = REFUSED[case]
    given: dict[str, Any] = {"student": text[0], "to": "safetensors", "out": tmp_path / "out"} | changes
    with pytest.raises(ExportError, match=said):
        export(given.pop("student"), given.pop("to"), given.pop("out"), **given)
    assert not list(tmp_path.iterdir())


def test_a_cache_of_which_nothing_is_held_out(text: tuple[Path, Cache], tmp_path: Path) -> None:
    """The student cannot be evaluated on it, which is said before it is exported."""
    with pytest.raises(StreamError, match="captured with held_out=0"):
        export(text[0], "safetensors", tmp_path / "out", cache=make_cache(tmp_path / "cache", held_out=0.0))
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(text: tuple[Path, Cache], exported: Path, tmp_path: Path) -> None:
    student, cache = text
    with pytest.raises(ExportError, match=r"which exists; expected a new folder"):
        export(student, "safetensors", exported)
    with pytest.raises(ExportError, match=r"got the folder of a run; expected that of its student, .*student"):
        export(student.parent, "safetensors", tmp_path / "out")
    begun = tmp_path / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"the run .* is not finished. Run the same training again"):
        export(begun / "student", "safetensors", tmp_path / "out")
    cut = tmp_path / "cut"
    shutil.copytree(student, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert cli.main(["export", str(cut), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    fastkd.capture(Tiny(vocab=VOCAB + 8, seed=5), documents(20), tmp_path / "other", **CAPTURE)
    other = open_cache(tmp_path / "other")
    with pytest.raises(ExportError, match=rf"got a cache of {VOCAB + 8} outcomes; expected at most {VOCAB}"):
        export(student, "safetensors", tmp_path / "out", cache=other)
    images = vision_cases.make_cache(tmp_path / "images")
    with pytest.raises(ExportError, match="got a cache of examples without data"):
        export(student, "safetensors", tmp_path / "out", cache=images)
    assert not (tmp_path / "out").exists()
    assert cache.sealed


def test_an_export_of_somebody_else(text: tuple[Path, Cache], exported: Path, tmp_path: Path) -> None:
    """It names no files outside its folder, no function to call, and its values are of the types that are written."""
    forged: dict[str, dict[str, Any]] = {
        r"as the function that makes its module; expected none": {"written": {"factory": "deploy_cases:net"}},
        r"files: got '../x'; expected names": {"files": {"../x": ""}},
        r"files: got '/x'; expected names": {"files": {"/x": ""}},
        r"written: got '../model.pte'; expected one": {"written": {"files": ["../model.pte"]}},
        r"written: got '/model.onnx'; expected one": {"written": {"file": "/model.onnx"}},
        r"files: got None; expected dict": {"files": None},
        r"source: got \[1\]; expected dict": {"source": [1]},
        r"vocab_size: got 'many'; expected int": {"vocab_size": "many"},
        r"vocab_size: got 0; expected a number from 1": {"vocab_size": 0},
        r"max_positions: got -5; expected a number": {"max_positions": -5},
        r"kind: got 'x'; expected text": {"kind": "x"},
        r"bytes: got 'x'; expected int": {"bytes": "x"},
    }
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    document = json.loads((copy / FILE).read_text())
    del document["sha256"]
    for said, changes in forged.items():
        (copy / FILE).write_text(json.dumps(document | changes))
        with pytest.raises(ExportError, match=said):
            deploy_report(text[0], [copy])


def test_places_that_cannot_be_written(text: tuple[Path, Cache], exported: Path, tmp_path: Path) -> None:
    """They are refused before anything is loaded or measured."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ExportError, match=r"out: got .*file/a/out, but .*file is no folder; expected"):
        export(text[0], "safetensors", file / "a" / "out")
    with pytest.raises(ExportError, match=r"out: got .*file/page.html, but .*file is no folder; expected"):
        deploy_report(text[0], [exported], file / "page.html")
    with pytest.raises(ExportError, match=r"out: got .*, which is a folder; expected the name of a file"):
        deploy_report(text[0], [exported], tmp_path)
    assert sorted(tmp_path.iterdir()) == [file]


def test_a_changed_export_is_not_measured(text: tuple[Path, Cache], exported: Path, tmp_path: Path) -> None:
    student, _ = text
    with pytest.raises(ExportError, match=f"got no {FILE}"):
        deploy_report(student, [student])
    for name, said in ((FILE, "damaged"), ("config.json", "config.json has changed"), (EVALUATION, "damaged")):
        copy = tmp_path / name
        shutil.copytree(exported, copy)
        path = copy / name
        path.write_text(path.read_text().replace("1", "2", 1))
        with pytest.raises(ExportError, match=said):
            deploy_report(student, [copy])
    copy = tmp_path / "less"
    shutil.copytree(exported, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model.safetensors is missing. Export the student again"):
        deploy_report(student, [copy])
    changed = tmp_path / "changed"
    shutil.copytree(student, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(ExportError, match=r"got an export of .*; expected one of .*, with the weights that it has now"):
        deploy_report(changed, [exported])
    (exported / EVALUATION).rename(tmp_path / "kept")
    try:
        with pytest.raises(ExportError, match=r"has not been evaluated\. Give a cache"):
            deploy_report(student, [exported], at_most=1.0)
    finally:
        (tmp_path / "kept").rename(exported / EVALUATION)


def test_what_an_exporter_raises_is_one_sentence(
    text: tuple[Path, Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*given: Any) -> Any:
        (given[1] / "half").touch()
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(safetensors, "write", write)
    said = r"the format safetensors cannot write LlamaForCausalLM \(RuntimeError: no such operator\)\. Nothing was"
    with pytest.raises(ExportError, match=said):
        export(text[0], "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(safetensors, "EXTRA", "edge")
    with pytest.raises(ExportError, match=r"which needs no_such_package; .*pip install 'fastkd\[edge\]'"):
        find("safetensors")


def test_every_format_has_its_members() -> None:
    for name in names():
        module = __import__(f"fastkd.deploy.formats.{name}", fromlist=["x"])
        assert set(module.QUANTIZE) <= {"none", "int8", "int4"}
        assert callable(module.check)
        assert callable(module.write)
        assert callable(module.load)
        assert bool(module.EXTRA) == bool(module.PACKAGES)


KILLED = """
import os, signal
import fastkd.deploy.formats.safetensors as safetensors
from fastkd.deploy import export
plain = safetensors.write
def write(*given):
    plain(*given)
    os.kill(os.getpid(), signal.SIGKILL)
safetensors.write = write
export(arguments[0], "safetensors", arguments[1])
"""


def test_a_killed_export_leaves_no_folder(text: tuple[Path, Cache], tmp_path: Path) -> None:
    """Killed when the format's files are written, but before they have their name; the next export begins anew."""
    out = tmp_path / "out"
    process = Forked(code, KILLED, 0, [str(text[0]), str(out)])
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    (tmp_path / ".out.part" / "rest").touch()
    export(text[0], "safetensors", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "rest").exists()
