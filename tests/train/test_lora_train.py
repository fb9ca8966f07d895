"""`fastkd train --lora-rank`: what is trained, kept, resumed and written."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from hf_cases import model_of, tokenizer_of
from lora_cases import adapted, folder_of
from torch import Tensor
from train_cases import SMALL, Tiny, bits, make_cache, stopped

import fastkd
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.models.hub import load_transformers
from fastkd.report.make import make_report
from fastkd.settings import TrainSettings
from fastkd.teachers.hf import load_hf
from fastkd.train.checkpoint import model_tensors, newest
from fastkd.train.lora import merged, whole_tensors
from fastkd.train.settings_check import stated
from fastkd.train.student import make_student
from fastkd.train.trainer import Pause

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(12)[None]
WIDE = {"vocab_size": 300}  # for the tokenizer, to whose length PEFT would make it
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA: dict[str, Any] = SMALL | {"steps": 6, "lora_rank": 3, "rate": 1e-2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a base with its tokenizer, and a student that was trained on it."""
    folder = tmp_path_factory.mktemp("lora")
    make_cache(folder / "cache")
    model_of("llama", seed=5, **WIDE).save_pretrained(folder / "base")
    tokenizer_of().save_pretrained(folder / "base")
    assert fastkd.train(folder / "base", folder / "cache", folder / "run", **LORA, lora_merge=True).complete
    return folder


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def test_the_result_is_an_adapter_folder(place: Path) -> None:
    """As PEFT writes and loads it; it is not the base any more, and equals its merged copy."""
    import peft

    run = place / "run"
    config = json.loads((run / "student" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.0)
    assert config["base_model_name_or_path"] == str(place / "base")
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(LINEAR)
    assert not list((run / "student").glob("model*"))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(run / "student")
    base = load_transformers().AutoModelForCausalLM.from_pretrained(place / "base")
    plain = logits_of(base)
    assert (logits_of(auto) - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(base, run / "student")), logits_of(auto))
    merged = load_transformers().AutoModelForCausalLM.from_pretrained(run / "student-merged")
    torch.testing.assert_close(logits_of(merged), logits_of(auto), rtol=1e-4, atol=1e-5)
    for folder in ("student", "student-merged"):
        load_transformers().AutoTokenizer.from_pretrained(run / folder)
    assert torch.equal(logits_of(make_student(run / "student", None).student.model), logits_of(auto))


def test_peft_warns_of_nothing_that_a_person_could_change() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted()
    assert not [one for one in said if "is_gradient_checkpointing" in str(one.message)]


def test_checkpoints_have_no_base(place: Path) -> None:
    """And run.json says what it is."""
    found = newest(place / "run")
    assert found is not None
    assert all("lora_" in name for name in found.tensors("model"))
    trained = sum(x.numel() for x in found.tensors("model").values())
    student = json.loads((place / "run" / "run.json").read_text())["student"]
    whole = sum(p.numel() for p in model_of("llama", **WIDE).parameters())
    assert student["parameters"] == trained + whole
    assert student["adapter"] == {"kind": "LORA", "base": str(place / "base"), "trained_parameters": trained}
    assert student["base_sha256"] == found.state["base"]
    make_report([place / "run"], place / "report.html")
    assert "lora_rank" in (place / "report.html").read_text()


def test_a_training_of_the_adapter_alone_by_hand(place: Path) -> None:
    """What fastkd trains is what a plain loop over PEFT's own model does."""
    import peft

    from fastkd import DistillLoader, kd_loss
    from fastkd.train.optimizer import rate_at

    settings = TrainSettings(**LORA)
    base = load_transformers().AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules="all-linear")
        model = peft.get_peft_model(base, config)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, weight_decay=settings.weight_decay, betas=settings.adam_betas)
    loader = DistillLoader(place / "cache", batch_tokens=60, micro_tokens=32)
    for number, step in zip(range(6), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(
                number, 6, peak=1e-2, schedule="cosine", warmup=settings.warmup, floor=settings.rate_floor
            )
        for batch in step.micro_batches:
            logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
            kd_loss(logits, batch.targets, batch.labels.flatten(), num_items=step.count).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loader.close()
    found = newest(place / "run")
    assert found is not None
    ours = found.tensors("model")
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[f"model.{name}"], p.detach(), rtol=1e-6, atol=1e-6, msg=name)


def test_a_control_and_an_evaluation(place: Path, tmp_path: Path) -> None:
    """By the command: the control has the same adapters, and no merged copy."""
    run = tmp_path / "run"
    command = ["train", "--student", str(place / "base"), "--cache", str(place / "cache"), "--out", str(run)]
    command += ["--steps", "4", "--batch-tokens", "60", "--lora-rank", "2", "--lora-alpha", "8", "--lora-targets"]
    command += ["q_proj,v_proj", "--lora-dropout", "0.1", "--lora-merge", "--control"]
    assert main(command) == 0
    for folder in (run, run / "control"):
        config = json.loads((folder / "student" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 8, 0.1)
        assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert (run / "student-merged" / "model.safetensors").exists()
    assert not (run / "control" / "student-merged").exists()
    report = json.loads((run / "run.json").read_text())["report"]
    assert report["exported"] == {"merged": str(run / "student-merged")}
    assert report["difference"]["cross_entropy"]


def test_going_on_from_an_adapter_folder(place: Path, tmp_path: Path) -> None:
    """Its adapter is trained on, of the same rank, under the name it has there."""
    student = place / "run" / "student"
    assert fastkd.train(student, place / "cache", tmp_path / "run", **{**LORA, "lora_rank": None}).complete
    config = json.loads((tmp_path / "run" / "student" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(place / "base"))
    before, after = (make_student(f, None).student.model for f in (student, tmp_path / "run" / "student"))
    assert (logits_of(before) - logits_of(after)).abs().max() > 1e-3
    assert (tmp_path / "run" / "student" / "tokenizer.json").exists()


def test_a_model_with_an_adapter_of_ones_own(place: Path, tmp_path: Path) -> None:
    """DoRA, a trained head and another name of the adapter: merged, it computes the same."""
    import peft

    base = load_transformers().AutoModelForCausalLM.from_pretrained(place / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(base, config, adapter_name="mine")
    changes = {**LORA, "lora_rank": None, "lora_merge": True}
    assert fastkd.train(model, place / "cache", tmp_path / "run", **changes).complete
    found = newest(tmp_path / "run")
    assert found is not None
    assert any("lm_head.modules_to_save" in name for name in found.tensors("model"))
    assert not any("original_module" in name or "base_layer" in name for name in found.tensors("model"))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    merged = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student-merged")
    torch.testing.assert_close(logits_of(merged), logits_of(loaded), rtol=1e-4, atol=1e-5)
    assert (logits_of(loaded) - logits_of(base)).abs().max() > 1e-2


def test_merging_changes_no_student(place: Path) -> None:
    student = make_student(place / "run" / "student", None).student
    before, names = logits_of(student.model), student.left_out
    tensors = {**model_tensors(student), **whole_tensors(student, names, kept=True)}
    whole = merged(student.model, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    weight = student.network.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight")
    assert not torch.equal(whole.model.layers[0].self_attn.q_proj.weight, weight)
    assert torch.equal(logits_of(student.model), before)


def test_transformers_own_adapters(place: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig

    model = load_transformers().AutoModelForCausalLM.from_pretrained(place / "base")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert fastkd.train(model, place / "cache", tmp_path / "run", **{**LORA, "lora_rank": None}).complete
    found = newest(tmp_path / "run")
    assert found is not None
    assert all("lora_" in name for name in found.tensors("model"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert (logits_of(loaded) - logits_of(make_student(place / "base", None).student.model)).abs().max() > 1e-4


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    """By its bytes, whatever its name."""
    shutil.copytree(place / "base", tmp_path / "base")
    arguments = (tmp_path / "base", place / "cache", tmp_path / "run")
    assert not fastkd.train(*arguments, **LORA, stop=stopped()).complete
    model_of("llama", seed=6, **WIDE).save_pretrained(tmp_path / "base")
    with pytest.raises(TrainError, match=r"got base with another base \(sha256 \w{12}…\) than the run began with"):
        fastkd.train(*arguments, **LORA)


@pytest.mark.parametrize(
    ("student", "changes", "message"),
    [
        ("base", {"lora_rank": 0}, "lora_rank: got 0; expected an integer from 1 on"),
        ("base", {"lora_rank": 2, "lora_alpha": 0.0}, r"lora_alpha: got 0\.0; expected a positive number"),
        ("base", {"lora_rank": 2, "lora_dropout": 1.5}, r"lora_dropout: got 1\.5; expected a number from 0 to 1"),
        ("base", {"lora_alpha": 8.0}, r"lora_alpha: got 8\.0 without lora_rank; expected the default"),
        ("base", {"lora_targets": ("q_proj",)}, r"lora_targets: got \('q_proj',\) without lora_rank"),
        ("base", {"lora_merge": True}, "lora_merge: got it for base, which has no adapters; expected lora_rank"),
        ("base", {"lora_rank": 2, "lora_targets": ("query",)}, "lora_targets: got query .*: q_proj, k_proj, v_proj"),
        ("run/student", {"lora_rank": 2}, "lora_rank: got 2 for student, which has adapters of its own"),
        ("new", {"lora_rank": 2}, "lora_rank: got 2 for new, whose weights are new; expected a trained model"),
        ("lost", {}, "got an adapter of 'nowhere/at/all', which is not found"),
        ("unnamed", {}, "got no base_model_name_or_path"),
        (Tiny(), {"lora_rank": 2}, "lora_rank: got 2 for Tiny, a torch module; expected a causal model"),
        ("tied", {"lora_rank": 2, "lora_targets": ("q_proj", "lm_head"), "lora_merge": True}, "tied to its embeddings"),
        ("run/student", {"exits": (1,), "export_exit": 1}, "export_exit: got 1 for a student with an adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_refused(place: Path, tmp_path: Path, student: Any, changes: dict[str, Any], message: str) -> None:
    if student == "new":
        (tmp_path / "new").mkdir()
        shutil.copy(place / "base" / "config.json", tmp_path / "new")
    if student in ("lost", "unnamed"):
        shutil.copytree(place / "run" / "student", tmp_path / student)
        config = json.loads((tmp_path / student / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "nowhere/at/all" if student == "lost" else None
        (tmp_path / student / "adapter_config.json").write_text(json.dumps(config))
    if student == "tied":
        model_of("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    source = student
    if isinstance(student, str):
        source = next(folder / student for folder in (tmp_path, place) if (folder / student).exists())
    with pytest.raises(TrainError, match=message):
        fastkd.train(source, place / "cache", tmp_path / "out", **{**SMALL, **changes})
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_defaults_are_not_in_fingerprints() -> None:
    from dataclasses import asdict

    assert not [name for name in stated(asdict(TrainSettings())) if "lora" in name]
    given = stated(asdict(TrainSettings(lora_rank=4)))
    assert [name for name in given if "lora" in name] == ["lora_rank", "lora_alpha", "lora_targets", "lora_dropout"]


def test_an_adapter_folder_as_a_teacher(place: Path, tmp_path: Path) -> None:
    """Merged into its base; its fingerprint has both."""
    teacher = load_hf(place / "run" / "student")
    student = make_student(place / "run" / "student", None).student
    output: Any = teacher(TOKENS)
    torch.testing.assert_close(output.states @ output.lm_head.weight.T, logits_of(student.model), rtol=1e-4, atol=1e-5)
    assert "merged into its base" in teacher.notes[0]
    other = folder_of(adapted(base=model_of("llama", seed=5, **WIDE)), tmp_path / "other", place / "base")
    assert len({load_hf(one).fingerprint for one in (place / "run" / "student", place / "base", other)}) == 3


def test_a_base_in_bfloat16(place: Path, tmp_path: Path) -> None:
    """Where products run in bfloat16, it stays in the type of its files; adapters are float32."""
    model_of("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        settings = TrainSettings(lora_rank=2, precision=precision)  # type: ignore[arg-type]
        student = make_student(tmp_path / "base", None, settings).student
        assert {p.dtype for p in student.parameters() if not p.requires_grad} == {dtype}
        assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    report = fastkd.train(
        tmp_path / "base", place / "cache", tmp_path / "run", **LORA, precision="bfloat16", lora_merge=True
    )
    assert report.complete
    merged = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student-merged")
    assert merged.dtype == torch.bfloat16


def outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = bits(run, LORA["steps"])
    results = ("student/adapter_model.safetensors", "student-merged/model.safetensors")
    return found | {name: (run / name).read_bytes() for name in results}


def test_interrupted_and_resumed(place: Path, tmp_path: Path) -> None:
    """With dropout in the adapter: to the bit, checkpoints and results."""
    changes = LORA | {"lora_dropout": 0.2, "lora_merge": True}
    arguments = (place / "base", place / "cache")
    assert fastkd.train(*arguments, tmp_path / "whole", **changes).complete
    for step in (1, 4):
        report = fastkd.train(*arguments, tmp_path / str(step), **changes, pause=Pause((), step))
        assert (report.step, report.complete) == (step, False)
        assert fastkd.train(*arguments, tmp_path / str(step), **changes).resumed == step
        assert outcome(tmp_path / str(step)) == outcome(tmp_path / "whole")


@pytest.mark.soak
def test_killed_and_resumed(place: Path, tmp_path: Path) -> None:
    changes = LORA | {"lora_dropout": 0.2, "checkpoint_every": 2, "lora_merge": True}
    arguments = (str(place / "base"), place / "cache")
    train_jobs.run(train_jobs.train, *arguments, tmp_path / "whole", changes)
    for moment in (2, 8, 17, 24, 33, 47):
        out = tmp_path / str(moment)
        died = train_jobs.start(train_jobs.train_and_die, *arguments, out, changes, moment)
        assert train_jobs.finish(died) == [-9]
        train_jobs.run(train_jobs.train, *arguments, out, changes)
        assert outcome(out) == outcome(tmp_path / "whole"), moment


def test_two_processes(place: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 equal one process; also with a base in bfloat16, and a merged copy written by FSDP2."""
    base = str(place / "base")
    changes = LORA | {"lora_merge": True, "rate": 1e-3}
    train_jobs.train(base, place / "cache", tmp_path / "one", changes)
    runs = [(base, place / "cache", tmp_path / kind, changes | {"parallel": kind}) for kind in ("ddp", "fsdp")]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    one = newest(tmp_path / "one")
    assert one is not None
    for kind in ("ddp", "fsdp"):
        found = newest(tmp_path / kind)
        assert found is not None
        assert found.state["base"] == one.state["base"]
        for group in ("model", "optimizer"):
            ours, theirs = found.tensors(group), one.tensors(group)
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
        merged = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / kind / "student-merged")
        student = make_student(tmp_path / kind / "student", None).student
        torch.testing.assert_close(logits_of(merged), logits_of(student.model), rtol=1e-4, atol=1e-5)


@pytest.mark.soak
def test_two_processes_with_a_base_in_bfloat16(place: Path, tmp_path: Path) -> None:
    """Adapters in float32 are sharded beside it; a merged copy is in the base's type."""
    model_of("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    changes = LORA | {"precision": "bfloat16", "lora_merge": True, "rate": 1e-3}
    base, kinds = str(tmp_path / "base"), ("ddp", "fsdp")
    runs = [(base, place / "cache", tmp_path / kind, changes | {"parallel": kind}) for kind in kinds]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    found = [newest(tmp_path / kind) for kind in kinds]
    assert found[0] is not None
    assert found[1] is not None
    ours, theirs = (one.tensors("model") for one in found if one is not None)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
