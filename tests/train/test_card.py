"""Model cards: what the Hugging Face Hub reads, what they say, and what they keep to themselves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import vision_cases
from hf_cases import saved, tokenizer_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results
from train_cases import SMALL, Tiny, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.models.hub import resolve
from fastkd.settings import ShareSettings
from fastkd.train.card import last_part, model_card, shown_command, written_by_fastkd
from fastkd.train.result import describe_student
from fastkd.train.student import make_student

RUN: dict[str, Any] = {
    "student": {"name": "small", "parameters": 1_234_567, "base": "someone/small", "license": {"license": "mit"}},
    "caches": [
        {"place": "s3://user:pass@bucket/private/prose?sig=abc", "spec": "ab" * 32, "positions": 1000, "bytes": 89_000,
         "k": 64, "draws": 16, "vocab_size": 49152},
    ],
    "settings": {"alpha": 0.5, "temperature": 2.0, "divergence": "forward_kl", "match": []},
    "command": ["fastkd", "train", "--student", "someone/small", "--cache", "/home/ann/prose", "--out", "runs/a"],
    "machine": {"fastkd": "1.0", "torch": "2.9", "processes": 2, "device": "cuda:0", "gpu": "A GPU"},
    "report": {
        "step": 200, "steps": 200,
        "evaluation": {"cross_entropy": 3.016, "agreement": 0.7512, "perplexity": 1e-5, "ema/cross_entropy": 2.9},
        "control": {"evaluation": {"cross_entropy": 3.0991, "agreement": 0.71}},
        "verdicts": {"control": {"windows": 40, "difference": {
            "cross_entropy": {"mean": -0.0831, "low": -0.1033, "high": -0.0629, "verdict": "helped"},
            "agreement": {"mean": 0.0412, "low": None, "high": None, "verdict": "no difference"},
        }}},
    },
}  # fmt: skip
SUMMARY = {
    "student": {"cross_entropy": {"mean": 3.016, "low": 2.965, "high": 3.067}},
    "control": {"cross_entropy": {"mean": 3.0991, "low": 3.05, "high": 3.15}},
}


def checked(text: str) -> ModelCardData:
    """The metadata of a card, as the Hub reads it: its results are valid, and nothing is lost on the way."""
    card = ModelCard(text)
    raw = card.data.to_dict()
    assert ModelCard(f"---\n{card.data.to_yaml()}\n---\n").data.to_dict() == raw
    if card.data.eval_results:
        name, results = model_index_to_eval_results(raw["model-index"])
        assert name == card.data.model_name
        assert len(results) == len(card.data.eval_results)
    return card.data


def test_what_a_card_says() -> None:
    text = model_card(RUN, SUMMARY, name="small", library="transformers", teacher="Big | One", repo="me/small")
    data = checked(text)
    assert (data.library_name, data.base_model, data.license) == ("transformers", "someone/small", "mit")
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["knowledge-distillation", "fastkd"]
    values = {one.metric_type: one.metric_value for one in data.eval_results}
    assert values == {"cross_entropy": 3.016, "agreement": 0.7512, "perplexity": 1e-5}
    assert {(one.task_type, one.dataset_name, one.dataset_split) for one in data.eval_results} == {
        ("text-generation", "held-out split of prose", "held_out")
    }
    assert data.eval_results[0].dataset_args == {"spec": ["ab" * 32]}
    assert "distilled from **Big \\| One**" in text
    assert f"`prose`, spec sha256 `{'ab' * 32}`, 1,000 positions in 89.0 kB, k = 64 and 16 draws of 49,152" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "| held out | student | control | student - control |"
    assert rows[2] == (
        "| cross-entropy (nats, lower is better) | 3.0160 [2.9650, 3.0670] | 3.0991 [3.0500, 3.1500] "
        "| -0.0831 [-0.1033, -0.0629]: helped |"
    )
    assert "| 75.12 | 71.00 | +4.12: no difference |" in rows[3]
    assert "    fastkd train --student someone/small --cache prose --out a\n" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in text
    for secret in ("user", "pass", "bucket", "private", "sig", "ann", "home", "runs"):
        assert secret not in text, secret


def test_parts_of_it_may_be_missing() -> None:
    least = model_card({"student": {"name": "s"}}, name="s")
    assert checked(least).to_dict() == {"library_name": "pytorch", "tags": ["knowledge-distillation", "fastkd"]}
    assert "a teacher that is not named here" in least
    ema = model_card(RUN, SUMMARY, name="s", part="ema", library="transformers")
    assert [one.metric_value for one in checked(ema).eval_results] == [2.9]
    assert "[2.9650" not in ema
    assert "| 2.9000 |" in ema
    lora = {"kind": "LORA", "base": "/home/ann/base", "trained_parameters": 1234}
    adapter = model_card({**RUN, "student": {"base": "base", "adapter": lora}}, name="s", library="peft")
    assert "from peft import AutoPeftModelForCausalLM" in adapter
    assert "an adapter (LORA) of 1,234 parameters" in adapter
    assert (checked(adapter).tags[-1], checked(adapter).base_model) == ("lora", "base")
    assert "ann" not in adapter
    other = model_card(RUN, name="s", text=False)
    assert checked(other).eval_results[0].task_type == "other"
    assert checked(other).pipeline_tag is None
    labels = model_card({**RUN, "settings": {"alpha": 1.0, "alpha_end": None}}, name="s")
    assert "hard labels alone" in labels.split("##")[0]
    together = model_card({**RUN, "peers": ["b"]}, name="s")
    assert "together with `b`: each learned from the others" in together


def test_names_are_no_markup() -> None:
    """Texts of a cache or a person are neither YAML nor Markdown nor control characters."""
    hostile = 'a"b: [\n---\n`|<b>\x1b[31m\u2028😀 \ud800'
    run = {**RUN, "student": {"name": hostile, "base": None, "class": hostile, "license": {"license_name": hostile}},
           "caches": [{"place": hostile, "spec": "x"}]}  # fmt: skip
    text = model_card(run, name=hostile, teacher=hostile)
    data = checked(text)
    assert data.model_name.startswith('a"b: [\\n---\\n`|<b>')
    assert "\x1b" not in text
    assert "<b>" not in text.split("\n---\n", 1)[1].replace("`a", "").split("## Evaluation")[0].split("- Cache")[0]
    text.encode()


def test_a_seal_tells_a_card_that_a_person_changed() -> None:
    text = model_card(RUN, SUMMARY, name="small")
    assert written_by_fastkd(text)
    assert model_card(RUN, SUMMARY, name="small") == text
    for changed in (text.replace("3.0160", "2.0160"), text + "\nMore.\n", "", "# Mine\n", text[:-2]):
        assert not written_by_fastkd(changed)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["fastkd", "train", "--teacher", "/data/secret-70b", "--data", "/home/a/*.jsonl", "x y/z w"],
         "fastkd train --teacher TEACHER --data *.jsonl 'z w'"),
        (["fastkd", "--teacher=org/secret", "--push", "a/x", "--card-teacher", "T", "--push-private", "--rate", "1"],
         "fastkd --teacher=TEACHER --rate 1"),
        (["fastkd", "--push=me/x", "--cache=s3://b/p/c?sig=1", "--student", "o/m", "--out", "~/runs/a/"],
         "fastkd --cache=c --student o/m --out a"),
        (["fastkd", "--out", "C:\\Users\\ann\\run", "--match=-1:8:mse:1"], "fastkd --out run --match=-1:8:mse:1"),
    ],
)  # fmt: skip
def test_commands_name_no_places(command: list[str], shown: str) -> None:
    assert shown_command(command, base="o/m") == shown
    assert shown_command(["--teacher", "secret"], teacher="A B") == "--teacher 'A B'"
    assert shown_command(["--teacher", "ema:0.99"]) == "--teacher ema:0.99"
    assert last_part("/") == "…"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("card") / "prose")


CHANGES: dict[str, Any] = {**SMALL, "steps": 2, "evaluate_every": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_student_of_transformers_with_a_control(cache: Cache, tmp_path: Path) -> None:
    """Licenses, the generation config, the tokenizer and its template go with it; a rerun writes the same."""
    base = saved(tmp_path / "home", "llama", vocab_size=300)
    tokenizer_of().save_pretrained(base)
    (base / "LICENSE").write_text("as it is")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n")
    generation = '{"do_sample": true, "temperature": 0.6, "eos_token_id": [1, 2]}'
    (base / "generation_config.json").write_text(generation)
    settings: dict[str, Any] = {**CHANGES, "control": True, "allow_other_tokenizer": True}
    share = ShareSettings(card_teacher="Big")
    report = fastkd.train(str(base), cache, tmp_path / "run", share=share, **settings)
    student = tmp_path / "run" / "student"
    first = contents(student)
    names = {"README.md", "LICENSE", "generation_config.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert names | {"chat_template.jinja"} <= first.keys()
    assert first["generation_config.json"].decode() == generation
    text = first["README.md"].decode()
    data = checked(text)
    assert (data.license, data.license_link, data.base_model) == ("apache-2.0", "LICENSE", "llama")
    assert "It began as llama." in text
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    values = {one.metric_type: one.metric_value for one in data.eval_results}
    assert values["cross_entropy"] == pytest.approx(report.evaluation["cross_entropy"], rel=1e-5)
    assert "distilled from **Big**" in text
    assert text.count("| cross-entropy") == 1
    verdict = report.verdicts["control"].difference["cross_entropy"]
    assert f"{verdict.mean:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]" in text
    control = (tmp_path / "run/control/student/README.md").read_text()
    assert "hard labels alone" in control.split("##")[0]
    assert checked(control).model_name == "llama-control"
    for path, found in contents(tmp_path / "run").items():
        if "student/" in path:
            assert str(tmp_path).encode() not in found, path

    again = fastkd.train(str(base), cache, tmp_path / "run", share=share, **settings)
    assert again.complete
    assert contents(student)["README.md"] == first["README.md"]
    mine = "# Mine\n"
    (student / "README.md").write_text(mine)
    fastkd.train(str(base), cache, tmp_path / "run", share=share, **settings)
    assert (student / "README.md").read_text() == mine


def test_a_module_and_what_is_beside_it(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fastkd.train(Tiny(seed=1), cache, out, **CHANGES)
    text = (out / "student" / "README.md").read_text()
    assert checked(text).library_name == "pytorch"
    assert "# model: a train_cases.Tiny" in text
    shutil.rmtree(out / "student")
    fastkd.train(Tiny(seed=1), cache, out, **CHANGES)
    assert (out / "student" / "README.md").read_text() == text


def test_without_an_evaluation_there_is_no_table(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", held_out=0)
    fastkd.train(Tiny(seed=1), cache, tmp_path / "run", **{**CHANGES, "evaluate_every": 0})
    text = (tmp_path / "run/student/README.md").read_text()
    assert checked(text).eval_results is None
    assert "## Evaluation" not in text


def test_students_that_learn_from_each_other(cache: Cache, tmp_path: Path) -> None:
    students = {"a": Tiny(seed=1), "b": Tiny(seed=2)}
    fastkd.mutual(students, cache, tmp_path / "run", k=5, control=True, **CHANGES)
    for name, other in (("a", "b"), ("b", "a")):
        text = (tmp_path / "run/students" / name / "README.md").read_text()
        assert checked(text).model_name == name
        assert f"together with `{other}`" in text
        assert "| student - control |" in text


def test_a_base_in_the_cache_of_the_hub_is_called_by_its_id(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--someone--some-llama" / "snapshots"
    saved(folder, "llama").rename(folder / ("0" * 40))
    files = resolve(folder / ("0" * 40))
    assert (files.hub, files.name) == ("someone/some-llama", "0" * 40)
    assert resolve(tmp_path).hub is None
    student = make_student(str(files.folder), cache.spec).student
    assert describe_student(student, (1, 2))["base"] == "someone/some-llama"
    text = model_card({"student": {"base": "someone/some-llama"}}, name="s")
    assert "[someone/some-llama](https://huggingface.co/someone/some-llama)" in text


def test_settings_without_a_meaning(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="push_private: got True without push; expected the default"):
        fastkd.train(Tiny(seed=1), cache, tmp_path / "run", share=ShareSettings(push_private=True), **CHANGES)
    args = ["train", "--student", "x", "--teacher", "y", "--data", "z", "--out", str(tmp_path / "run")]
    assert main([*args, "--train-teacher", "--card-teacher", "T"]) == 1
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_examples(tmp_path: Path) -> None:
    cache = vision_cases.make_cache(tmp_path / "digits")
    fastkd.train(vision_cases.Net(), cache, tmp_path / "run", data=vision_cases.examples(), **CHANGES)
    text = (tmp_path / "run/student/README.md").read_text()
    data = checked(text)
    assert (data.eval_results[0].task_type, data.eval_results[0].task_name) == ("other", "classification")
    assert data.pipeline_tag is None
    assert "intervals of 95% over examples" in text
