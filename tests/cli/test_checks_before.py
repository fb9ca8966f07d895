"""What is wrong is said before a model is loaded, and before anything is measured: every command that takes long."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train_cases
from hf_cases import saved, tokenizer_of
from train_cases import make_cache

from fastkd.bench import run as bench_run
from fastkd.cli import main as cli
from fastkd.models.hub import load_transformers

SMALL = ("--k", "8", "--draws", "4", "--context", "16", "--shard-positions", "64", "--batch-tokens", "64")
TEXTS = ["the quick brown fox", "the lazy dog", "and the other dogs jumps over the lazy dog " * 4] * 4
LOADED: list[str] = []


def model() -> Any:
    """A factory of a teacher and a student."""
    LOADED.append("a module")
    raise AssertionError("it was made")


class Place:
    """What the cases below are about. text: a folder with a model of transformers and its tokenizer."""

    def __init__(self, root: Path) -> None:
        self.root, self.text = root, saved(root, "llama", vocab_size=300)
        tokenizer_of().save_pretrained(self.text)
        self.other = saved(root / "other", "llama", vocab_size=300, seed=1)
        tokenizer_of().save_pretrained(self.other)
        self.data, self.longer, self.changed = root / "a.jsonl", root / "longer.jsonl", root / "changed.jsonl"
        for path, texts in ((self.data, TEXTS), (self.longer, [*TEXTS, "more"]), (self.changed, ["so", *TEXTS[1:]])):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.cache, self.ids = root / "cache", root / "ids"
        capture = ["capture", "--teacher", str(self.text), "--data", str(self.data), "--out", str(self.cache), *SMALL]
        assert cli.main(capture) == 0
        make_cache(self.ids)
        self.file, self.folder = root / "file", root / "full"
        self.file.write_text("")
        self.folder.mkdir()
        (self.folder / "letters.txt").write_text("mine")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("checks"))


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded or measured, although it must not be."""
    LOADED.clear()

    def forbidden(what: str) -> Callable[..., Any]:
        def load(*args: Any, **more: Any) -> Any:
            LOADED.append(what)
            raise AssertionError(f"{what} was loaded")

        return load

    models = load_transformers().AutoModelForCausalLM
    monkeypatch.setattr(models, "from_pretrained", forbidden("a model of transformers"))
    monkeypatch.setattr(models, "from_config", forbidden("a model of transformers"))
    monkeypatch.setattr(bench_run, "run_suites", forbidden("a benchmark"))
    return LOADED


ME = "test_checks_before:model"
CAPTURE = ["capture", "--teacher", "{text}", "--data", "{data}", "--out", "{root}/new", *SMALL]
AGAIN = ["capture", "--teacher", "{text}", "--data", "{data}", "--out", "{cache}", *SMALL]
PLAN = ["plan", "--teacher", "{text}", "--data", "{data}"]
TRAIN = ["train", "--student", "{text}", "--cache", "{cache}", "--out", "{root}/run"]
LIVE = ["train", "--student", "{text}", "--teacher", "{text}", "--data", "{data}", "--out", "{root}/run"]
SWEEP = ["sweep", "--student", "{text}", "--cache", "{cache}", "--out", "{root}/sweep", "--alpha", "0", "1"]
MUTUAL = ["mutual", "--student", "{text}", "{text}", "--cache", "{cache}", "--out", "{root}/run"]
BORN = ["generations", "2", "--student", "{text}", "--teacher", "{text}", "--data", "{data}", "--out", "{root}/born"]
MATCH = ["match", "{text}", "{cache}", "--teacher", "{text}", "--init", "{root}/init"]
STUDENT = ["student", "--teacher", "{text}", "--drop-every", "2", "--out", "{root}/small"]
EXPORT = ["export", "{root}/run/student", "--to", "safetensors", "--out", "{root}/exported"]
VERIFY = ["verify", "{cache}", "--teacher", "{text}"]
BENCH = ["bench", "loss"]
DEPLOY = ["deploy-report", "{root}/run/student", "{root}/exported"]
REPORT = ["report", "{root}/run"]
SPEC = ["export-cache", "{cache}", "--to", "specforge", "--teacher", "{text}", "--out", "{root}/draft"]

# a command, with the options that are wrong; a part of what is said
CASES: dict[str, tuple[list[str], str]] = {
    "capture, no data": ([*CAPTURE, "--data", "{root}/none.jsonl"], "none.jsonl"),
    "capture, no column": ([*CAPTURE, "--column", "txt"], "txt"),
    "capture, no teacher": ([*CAPTURE, "--teacher", "{root}/none"], "there is no such file or folder"),
    "capture, no module": ([*CAPTURE, "--teacher", "none_of:these"], "No module named 'none_of'"),
    "capture, no tokenizer": ([*CAPTURE, "--tokenizer", "{root}/none"], "there is no such file or folder"),
    "capture, no template": ([*CAPTURE, "--template", "{root}/none"], "--template: got"),
    "capture, other files": ([*CAPTURE, "--out", "{folder}"], "letters.txt"),
    "capture, into a file": ([*CAPTURE, "--out", "{file}/cache"], "cache"),
    "capture, a feature": ([*CAPTURE, "--features", "1", "--feature-step", "0"], "--feature-step"),
    "capture, another k": ([*AGAIN, "--k", "9"], "--k: 8 and 9"),
    "capture, another context": ([*AGAIN, "--context", "8"], "--context: 16 and 8"),
    "capture, another seed": ([*AGAIN, "--seed", "3"], "--seed: "),
    "capture, more documents": ([*AGAIN, "--data", "{longer}"], "--data: 12 documents and 13"),
    "capture, other documents": ([*AGAIN, "--data", "{changed}"], "--data: sha256"),
    "capture, another teacher": ([*AGAIN, "--teacher", "{other}"], "teacher: weights of sha256"),
    "capture, more documents of a module": ([*AGAIN, "--teacher", ME, "--data", "{longer}"], "12 documents and 13"),
    "capture, a seed": ([*CAPTURE, "--seed", "-1"], "--seed -1: expected an integer from 0 to"),
    "capture, a large seed": ([*CAPTURE, "--seed", str(2**64)], f"--seed {2**64}: expected an integer from 0 to"),
    "capture, threads": ([*CAPTURE, "--threads", "0"], "--threads 0: expected an integer from 1 on"),
    "capture, no processes": ([*CAPTURE, "--teacher-parallel", "0"], "--teacher-parallel 0: expected an integer"),
    "capture, a device": ([*CAPTURE, "--device", "meta"], "--device: got 'meta', whose tensors have no values"),
    "plan, no data": ([*PLAN, "--data", "{root}/none.jsonl"], "none.jsonl"),
    "plan, no tokenizer": ([*PLAN, "--tokenizer", "{root}/none"], "there is no such file or folder"),
    "train, no student": ([*TRAIN, "--student", "{root}/none"], "there is no such file or folder"),
    "train, no module": ([*TRAIN, "--student", "none_of:these"], "No module named 'none_of'"),
    "train, no cache": ([*TRAIN, "--cache", "{root}/none"], "none"),
    "train, no tokenizer": ([*TRAIN, "--tokenizer", "{root}/none"], "there is no such file or folder"),
    "train, a large seed": ([*TRAIN, "--seed", str(2**63)], f"--seed {2**63}: expected an integer from 0 to"),
    "train, long to wait": ([*TRAIN, "--timeout-minutes", "1e300"], "--timeout-minutes 1e+300: expected a number from"),
    "train, a device": ([*TRAIN, "--device", "meta"], "--device: got 'meta', whose tensors have no values"),
    "train, other files": ([*TRAIN, "--out", "{folder}"], "letters.txt"),
    "train, into a file": ([*TRAIN, "--out", "{file}"], "which is a file; expected a folder"),
    "train, below a file": ([*TRAIN, "--out", "{file}/run"], "is no folder"),
    "train, a measure": ([*TRAIN, "--best", "acuracy"], "--best acuracy: expected one of cross_entropy"),
    "train beside, no student": ([*LIVE, "--student", "{root}/none"], "student: "),
    "train beside, no data": ([*LIVE, "--data", "{root}/none.jsonl"], "none.jsonl"),
    "train beside, other documents": ([*LIVE, "--write-cache", "{cache}", *SMALL[:6]], "existing cache was"),
    "sweep, no student": ([*SWEEP, "--student", "{root}/none"], "student: "),
    "sweep, into a file": ([*SWEEP, "--out", "{file}"], "which is a file; expected a folder"),
    "sweep, no tokenizer": ([*SWEEP, "--tokenizer", "{root}/none"], "there is no such file or folder"),
    "mutual, no student": ([*MUTUAL, "--student", "{text}", "{root}/none"], "student: "),
    "mutual, a measure": ([*MUTUAL, "--best", "acuracy"], "--best acuracy: expected one of cross_entropy"),
    "generations, no student": ([*BORN, "--student", "{root}/none"], "student: "),
    "generations, no data": ([*BORN, "--data", "{root}/none.jsonl"], "none.jsonl"),
    "generations, no template": ([*BORN, "--template", "{root}/none"], "--template: got"),
    "generations, into a file": ([*BORN, "--out", "{file}"], "which is a file; expected a folder"),
    "match, no teacher": ([*MATCH, "--teacher", "{root}/none"], "there is no such file or folder"),
    "match, below a file": ([*MATCH, "--init", "{file}/init"], "is no folder"),
    "student, no tokenizer": ([*STUDENT, "--tokenizer", "{root}/none"], "there is no such file or folder"),
    "student, below a file": ([*STUDENT, "--out", "{file}/small"], "is no folder"),
    "export, a format": ([*EXPORT, "--to", "gif"], "expected one of"),
    "export, there already": ([*EXPORT, "--out", "{folder}"], "which exists"),
    "export, no cache": ([*EXPORT, "--cache", "{root}/none"], "none"),
    "deploy-report, a folder": ([*DEPLOY, "--out", "{folder}"], "which is a folder"),
    "export-cache, other files": ([*SPEC, "--out", "{folder}"], "letters.txt"),
    "export-cache, into a file": ([*SPEC, "--out", "{file}"], "which is a file; expected a folder"),
    "verify, no teacher": ([*VERIFY, "--teacher", "{root}/none"], "there is no such file or folder"),
    "verify, a sample": ([*VERIFY, "--sample", "-1"], "--sample -1: expected an integer from 0 on"),
    "verify, no examples": ([*VERIFY, "--examples", "none_of:these"], "No module named 'none_of'"),
    "bench, a folder": ([*BENCH, "--page", "{folder}"], "which is a folder"),
    "bench, below a file": ([*BENCH, "--json", "{file}/found.json"], "is no folder"),
    "report, a folder": ([*REPORT, "--out", "{folder}"], "folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_first(
    case: str, place: Place, nothing_loaded: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words, expected = CASES[case]
    arguments = [word.format(**vars(place)) for word in words]
    assert cli.main(_last(arguments)) in (1, 2)
    said = capfd.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not nothing_loaded
    assert not [path for name in ("run", "sweep", "born", "small", "init", "draft") for path in place.root.glob(name)]


def _last(arguments: list[str]) -> list[str]:
    """Arguments in which an option that was given again has its last values."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for word in arguments:
        if word.startswith("--"):
            found[name := word] = []
        else:
            found[name].append(word)
    return found.pop("") + [word for flag, values in found.items() for word in (flag, *values)]


@pytest.mark.parametrize(
    ("words", "lacking"),
    [
        ([*BENCH, "--page", "{root}/page.html"], "matplotlib"),
        ([*BENCH, "--page", "{root}/page.html"], "jinja2"),
        (DEPLOY, "matplotlib"),
        ([*TRAIN, "--lora-rank", "4"], "peft"),
        ([*TRAIN, "--quantize", "int4"], "torchao.quantization.qat"),
        (["demo", "--out", "{root}/demo"], "matplotlib"),
        (["demo", "--out", "{root}/demo", "--task", "digits"], "jinja2"),
    ],
)
def test_a_package_that_is_needed_at_the_end(
    words: list[str], lacking: str, place: Place, nothing_loaded: list[str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, lacking, None)
    assert cli.main([word.format(**vars(place)) for word in words]) == 1
    said = capfd.readouterr().err
    assert lacking.partition(".")[0] in said
    assert "pip install 'fastkd[" in said
    assert not nothing_loaded


def test_the_same_command_again_is_not_refused(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """A cache whose settings, documents and teacher are the same, also with the defaults that these decide."""
    arguments = [word.format(**vars(place)) for word in AGAIN]
    assert cli.main(arguments) == 0
    assert "nothing to do, the teacher did not run" in capfd.readouterr().out


def test_settings_of_a_run_are_compared_before_the_student_is_made(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also more steps of a run that is finished, for which the way is named."""
    run = ["train", "--student", "train_cases:tiny", "--cache", str(place.ids), "--out", str(tmp_path / "run")]
    assert cli.main([*run, "--steps", "1"]) == 0
    made: list[int] = []
    monkeypatch.setattr(train_cases, "tiny", lambda: made.append(1))
    for changed, expected in (("--steps 2", "steps: 1 there, 2 here"), ("--steps 1 --rate 1", "rate: 0.0003 there, 1")):
        assert cli.main([*run, *changed.split()]) == 1
        said = capfd.readouterr().err
        assert expected in said
        assert ("A run cannot be made longer" in said) == changed.startswith("--steps 2")
        assert not made
