"""Training: what a step does, what a run leaves, how it goes on, and what it refuses."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from hf_cases import VOCAB, config_of, saved, tokenizer_of
from safetensors.torch import load_file
from torch import Tensor, nn
from train_cases import SMALL, Tiny, documents, make_cache

import fastkd
from fastkd import DistillLoader, kd_loss
from fastkd.cache import Cache, open_cache
from fastkd.cli.main import main
from fastkd.errors import StreamError, TrainError
from fastkd.evaluate.api import Evaluation, evaluate
from fastkd.kernels.lm_head import LMHead
from fastkd.models.hub import load_transformers
from fastkd.models.protocol import Hidden
from fastkd.settings import TrainSettings
from fastkd.train.checkpoint import newest, read, steps_of
from fastkd.train.metrics import read_metrics
from fastkd.train.optimizer import rate_at
from fastkd.train.student import Student, of_module
from fastkd.utils.signals import Stop


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("train") / "cache")


def train(cache: Any, out: Path, student: Any = None, **changes: Any) -> fastkd.TrainReport:
    return fastkd.train(Tiny(seed=1) if student is None else student, cache, out, **{**SMALL, **changes})


def weights(out: Path) -> dict[str, Tensor]:
    found = newest(out)
    assert found is not None
    return found.tensors("model")


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_ten_steps_against_a_loop_written_out(cache: Cache, tmp_path: Path) -> None:
    """Dense logits, one loss over all of a step, torch's own AdamW."""
    student = Tiny(seed=1, dtype=torch.float64)
    train(cache, tmp_path, student, alpha=0.3, alpha_end=0.8, temperature=2.0, clip=0.7, warmup=0.2)
    model = Tiny(seed=1, dtype=torch.float64)
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "embedding.weight"]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embedding.weight"]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    loader = DistillLoader(cache, batch_tokens=60, micro_tokens=None)
    norms = []
    for number, step in zip(range(10), loader.steps(), strict=False):
        (batch,) = step.micro_batches
        said = model(batch.input_ids)
        logits = said.states @ said.lm_head.weight.T
        alpha = 0.3 + 0.5 * number / 9
        loss = kd_loss(logits, batch.targets, batch.labels, alpha=alpha, temperature=2.0, impl="reference").loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        norms.append(float(norm))
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.7 / float(norm))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(number, 10, peak=0.01, schedule="cosine", warmup=0.2, floor=0.1)
        optimizer.step()
    loader.close()
    # alpha is a float32 tensor, and 0.3 is not one
    assert_close(weights(tmp_path), {f"model.{n}": p.detach() for n, p in model.named_parameters()}, 1e-6)
    assert [line["grad_norm"] for line in read_metrics(tmp_path)] == pytest.approx(norms, rel=1e-5)


def test_what_is_said_of_each_step(cache: Cache, tmp_path: Path) -> None:
    report = train(cache, tmp_path, temperature=1.0, temperature_end=2.0, rate_schedule="wsd", evaluate_every=4)
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    for number, line in enumerate(steps):
        assert line["loss"] == pytest.approx(0.5 * line["hard"] + 0.5 * line["soft"], rel=1e-5)
        assert line["temperature"] == pytest.approx(1 + number / 9)
        assert 0 <= line["waiting"] <= 1
        assert line["positions_per_second"] == pytest.approx(line["positions"] / line["seconds"])
    assert sum(line["positions"] for line in steps) == report.positions
    assert report.metrics == steps[-1]
    evaluations = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    assert list(evaluations) == [4, 8, 10]
    assert {"cross_entropy", "kl_bucket", "agreement"} <= set(report.evaluation)
    assert report.evaluation == evaluations[10]
    assert report.best["value"] == min(e["cross_entropy"] for e in evaluations.values())


def test_what_a_run_leaves(cache: Cache, tmp_path: Path) -> None:
    report = train(cache, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"]["batch_tokens"] == SMALL["batch_tokens"]
    (described,) = run["caches"]
    assert described["spec"] == cache.spec.hash
    assert described["vocab_size"] == VOCAB
    model = Tiny()
    assert run["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert run["student"]["bytes"] == 4 * run["student"]["parameters"]
    assert run["machine"]["torch"] == torch.__version__
    assert run["report"] == json.loads(json.dumps(report.to_json()))
    assert report.complete
    assert report.status == 0
    assert report.student is not None
    model.load_state_dict(load_file(Path(report.student) / "model.safetensors"))
    for name, p in model.named_parameters():
        assert torch.equal(p, weights(tmp_path)[f"model.{name}"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_transformers_loads_the_result(kind: str, cache: Cache, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind)
    tokenizer_of().save_pretrained(folder)
    before = load_transformers().AutoModelForCausalLM.from_pretrained(folder)
    train(cache, tmp_path / "run", folder, steps=2)
    model, info = load_transformers().AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "student", output_loading_info=True
    )
    assert not any(info.values()), info
    found = weights(tmp_path / "run")
    for name, p in model.named_parameters():
        assert torch.equal(p, found[f"model.{name}"]), name
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    tokenizer = load_transformers().AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert tokenizer("the quick")["input_ids"] == tokenizer_of()("the quick")["input_ids"]


def test_a_control_sees_the_same_and_learns_from_labels_alone(cache: Cache, tmp_path: Path) -> None:
    report = train(cache, tmp_path, control=True, evaluate_every=5, alpha=0.2, alpha_end=0.4)
    ours, theirs = read_metrics(tmp_path), read_metrics(tmp_path / "control")
    assert {line["alpha"] for line in theirs if "alpha" in line} == {1.0}
    # the same student before the first step, the same batches throughout
    assert ours[0]["hard"] == theirs[0]["hard"]
    for name in ("positions", "sequences", "epoch", "rate"):
        assert [line.get(name) for line in ours] == [line.get(name) for line in theirs]
    assert report.control is not None
    both = json.loads((tmp_path / "run.json").read_text())["report"]
    for name, value in report.evaluation.items():
        assert both["difference"][name] == pytest.approx(value - report.control.evaluation[name])
    alone = fastkd.train(Tiny(seed=1), cache, tmp_path / "alone", **SMALL, alpha=1.0)
    assert alone.complete
    assert_close(weights(tmp_path / "alone"), weights(tmp_path / "control"), 0.0)


def test_called_again(cache: Cache, tmp_path: Path) -> None:
    """Where all is done, nothing is; with another setting it is refused, unless that decides nothing."""
    first = train(cache, tmp_path)
    before = weights(tmp_path)
    again = train(cache, tmp_path)
    assert (again.resumed, again.positions, again.metrics) == (10, 0, first.metrics)
    assert_close(weights(tmp_path), before, 0.0)
    with pytest.raises(
        TrainError, match=r"alpha: 0\.5 there, 0\.25 here; rate: 0\.01 there, 0\.02 here.*another folder"
    ):
        train(cache, tmp_path, rate=0.02, alpha=0.25)
    with pytest.raises(TrainError, match=r"steps: 10 there, 20 here"):
        train(cache, tmp_path, steps=20)
    with pytest.raises(TrainError, match=r"head is \(96, 12\) torch.float32 there"):
        train(cache, tmp_path, Tiny(dtype=torch.float64))
    assert train(cache, tmp_path, micro_tokens=8, keep=1, threads=1).complete


def test_another_cache_is_not_gone_on_with(cache: Cache, tmp_path: Path) -> None:
    train(cache, tmp_path / "run")
    other = make_cache(tmp_path / "other", documents(seed=3))
    with pytest.raises(StreamError, match="caches"):
        train(other, tmp_path / "run")


def test_a_stop_leaves_a_checkpoint_to_go_on_from(cache: Cache, tmp_path: Path) -> None:
    train(cache, tmp_path / "whole")
    stop = Stop()
    stop()
    steps = []
    while (report := train(cache, tmp_path / "run", stop=stop)).status == 75:
        steps.append(report.step)
        assert report.student is None
    assert steps == list(range(1, 10))  # a step a time
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), 0.0)


def test_the_best_is_kept_and_can_be_the_result(cache: Cache, tmp_path: Path) -> None:
    values = iter([5.0, 3.0, 4.0, 3.5, 3.2, 3.0])  # the last one is of what is exported

    def evaluate(student: Student) -> dict[str, float]:
        assert not student.training
        return {"mine": next(values)}

    report = train(
        cache, tmp_path, evaluate=evaluate, evaluate_every=2, checkpoint_every=1, best="mine", export="best", keep=2
    )
    assert report.best == {"step": 4, "measure": "mine", "value": 3.0}
    assert report.evaluation == {"mine": 3.0}
    assert steps_of(tmp_path) == [4, 9, 10]
    best = read(tmp_path, 4)
    assert not isinstance(best, str)
    exported = load_file(tmp_path / "student" / "model.safetensors")
    assert_close({f"model.{n}": t for n, t in exported.items()}, best.tensors("model"), 0.0)
    with pytest.raises(TrainError, match="best: got 'other'; expected one of mine"):
        train(cache, tmp_path / "other", evaluate=lambda student: {"mine": 1.0}, evaluate_every=2, best="other")


def test_what_is_measured_at_the_end_is_what_is_exported(cache: Cache, tmp_path: Path) -> None:
    """A teacher's copy on hard labels: the first step does least harm."""
    changes: dict[str, Any] = {"alpha": 1.0, "evaluate_every": 1, "best": "kl_bucket", "rate": 0.05}
    for export in ("best", "last", "best"):  # the same run, called again, gives the other
        report = train(cache, tmp_path, Tiny(seed=7), export=export, **changes)
        measured = Evaluation.from_json(json.loads((tmp_path / "evaluation.json").read_text()))
        student = Tiny()
        student.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))
        again = evaluate(of_module(student, "again"), cache, batch_tokens=SMALL["micro_tokens"])
        assert again.summary() == measured.summary()
        assert report.evaluation["kl_bucket"] == again.summary()["kl_bucket"]["mean"]
        assert (report.evaluation["kl_bucket"] == report.best["value"]) == (export == "best")
        assert json.loads((tmp_path / "run.json").read_text())["report"]["evaluation"] == report.evaluation


def test_agreement_is_better_when_it_is_higher(cache: Cache, tmp_path: Path) -> None:
    values = iter([0.1, 0.3, 0.2])
    report = train(
        cache, tmp_path, evaluate=lambda student: {"agreement": next(values)}, evaluate_every=4, best="agreement"
    )
    assert report.best == {"step": 8, "measure": "agreement", "value": 0.3}


def test_evaluations_and_checkpoints_change_nothing(cache: Cache, tmp_path: Path) -> None:
    student = Tiny(seed=1, dropout=0.3)
    train(cache, tmp_path / "plain", student)
    train(cache, tmp_path / "busy", student, evaluate_every=1, checkpoint_every=1, evaluate=_drawing)
    assert_close(weights(tmp_path / "busy"), weights(tmp_path / "plain"), 0.0)


def _drawing(student: Student) -> dict[str, float]:
    return {"cross_entropy": float(torch.rand(()))}


def test_the_callers_generator_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(cache, tmp_path, config_of("llama"), steps=1)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("student", [Tiny(seed=1, dropout=0.3), config_of("llama", attention_dropout=0.3)])
def test_activation_checkpointing_changes_nothing(student: Any, cache: Cache, tmp_path: Path) -> None:
    for name, changes in (("plain", {}), ("less", {"activation_checkpointing": True})):
        train(cache, tmp_path / name, student, steps=3, **changes)
    assert_close(weights(tmp_path / "less"), weights(tmp_path / "plain"), 1e-6)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, while it compiles
def test_compiled_layers_change_nothing(cache: Cache, tmp_path: Path) -> None:
    for name in ("plain", "compile"):
        train(cache, tmp_path / name, Tiny(seed=1, dtype=torch.float64), steps=3, compile=name == "compile")
    assert_close(weights(tmp_path / "compile"), weights(tmp_path / "plain"), 1e-9)


def test_packed_and_padded_come_to_the_same(cache: Cache, tmp_path: Path) -> None:
    for layout in ("packed", "padded"):
        train(cache, tmp_path / layout, config_of("llama"), layout=layout, rate=1e-3)
    assert_close(weights(tmp_path / "packed"), weights(tmp_path / "padded"), 2e-5)


def test_bfloat16(cache: Cache, tmp_path: Path) -> None:
    exact = train(cache, tmp_path / "exact", config_of("llama"), rate=1e-3)
    rounded = train(cache, tmp_path / "rounded", config_of("llama"), rate=1e-3, precision="bfloat16")
    assert rounded.metrics["loss"] != exact.metrics["loss"]
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)
    assert {t.dtype for t in weights(tmp_path / "rounded").values()} == {torch.float32}


def test_a_mixture_of_caches(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", documents(seed=3))
    report = train([(cache, 3.0), (other, 1.0)], tmp_path / "run", evaluate_every=10)
    assert "kl_bucket" in report.evaluation
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["caches"]) == 2


def test_without_steps_it_is_epochs(cache: Cache, tmp_path: Path) -> None:
    expected = math.ceil(1.5 * len(DistillLoader(cache, batch_tokens=200)))
    report = train(cache, tmp_path, steps=None, epochs=1.5, batch_tokens=200)
    assert report.steps == report.step == expected
    assert read_metrics(tmp_path)[-1]["epoch"] == 1


class NotANumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.nan


class Failing(nn.Module):
    """Says what is no number from its n-th call in training on, or has such a gradient."""

    def __init__(self, calls: int, backward: bool) -> None:
        super().__init__()
        self.inner, self.left, self.backward = Tiny(seed=1), calls, backward

    def forward(self, tokens: Tensor) -> Hidden:
        said = self.inner(tokens)
        states = said.states
        if self.training:
            self.left -= 1
            if self.left < 0:
                states = NotANumber.apply(states) if self.backward else states * torch.nan
        return Hidden(states, LMHead(self.inner.head))


@pytest.mark.parametrize("backward", [True, False])
def test_what_is_not_a_number_stops_the_run(backward: bool, cache: Cache, tmp_path: Path) -> None:
    changes = {"micro_tokens": 1000, "checkpoint_every": 2}
    what = "grad_norm is nan" if backward else "NaN or infinite logits"
    with pytest.raises(TrainError, match=rf"step 6: .*{what}.*epoch 0, step 5 of it, \d sequences.* step 4 is kept"):
        train(cache, tmp_path, Failing(5, backward), **changes)
    assert steps_of(tmp_path) == [2, 4]
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values())
    assert len(read_metrics(tmp_path)) == 5
    # and from there it goes on
    assert train(cache, tmp_path, Failing(100, backward), **changes).complete


def test_a_checkpoint_at_the_step_itself_is_not_written(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"step 4: grad_norm is nan.*step 2 is kept"):
        train(cache, tmp_path, Failing(3, True), micro_tokens=1000, checkpoint_every=2)
    assert steps_of(tmp_path) == [2]


def test_a_full_disk_leaves_work(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before is kept, and gone on from."""
    from fastkd.errors import WorkRemains
    from fastkd.train import checkpoint

    writer = checkpoint.FileSystemWriter
    write, left = writer.write_data, iter([True] * 2)  # checkpoints

    def full(*arguments: Any) -> Any:
        if not next(left, False):
            raise OSError(28, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_data", full)
        with pytest.raises(WorkRemains, match=r"checkpoint of step 6 cannot be written .*No space.* free disk space"):
            train(cache, tmp_path, checkpoint_every=2)
    assert steps_of(tmp_path) == [2, 4]
    assert train(cache, tmp_path, checkpoint_every=2).resumed == 4


def test_nothing_to_train(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="none of its parameters requires a gradient"):
        train(cache, tmp_path, Tiny().requires_grad_(False))


def test_an_incomplete_cache(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", held_out=0.0)
    (tmp_path / "cache" / "manifest.parquet").unlink()
    next(iter(sorted((tmp_path / "cache" / "shards").glob("*3.zarr.zip")))).unlink()
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(StreamError, match=r"1 of the \d+ shards .* allow_partial"):
        train(cache, tmp_path / "run")
    assert train(cache, tmp_path / "run", allow_partial=True).complete


def test_without_a_held_out_split(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", held_out=0.0)
    with pytest.raises(TrainError, match=r"evaluate_every: got 5, and no documents of .* were held out"):
        train(cache, tmp_path / "run", evaluate_every=5)
    assert not train(cache, tmp_path / "run", evaluate_every=None).evaluation


def test_fewer_sequences_than_processes(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", [[1, 2, 3, 4], [5, 6, 7, 8]], held_out=0.5)
    arguments = ("train_cases:tiny", tmp_path / "cache", tmp_path / "run", SMALL | {"batch_tokens": 16})
    train_jobs.run(train_jobs.refused, *arguments, "got 2 ranks; expected at most 1, the sequences per step", ranks=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float16"}, "precision: got 'float16'; expected one of auto, float32, bfloat16 .*scaling"),
        ({"rate_schedule": "step"}, "rate_schedule: got 'step'; expected one of cosine"),
        ({"parallel": "zero"}, "parallel: got 'zero'"),
        ({"alpha": 1.5}, "alpha: got 1.5; expected a number from 0 to 1"),
        ({"alpha_end": -1.0}, "alpha_end: got -1.0"),
        ({"warmup": 2.0}, "warmup: got 2.0"),
        ({"steps": 0}, "steps: got 0; expected an integer from 1 on"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"device": "nothing"}, "device: got 'nothing'"),
        ({"temperature": 0.5}, "temperature: got 0.5.*The cache has tails at"),
        ({"temperature_end": 0.9}, "temperature: got 0.9"),
        ({"divergence": "reverse_kl", "treatment": "sampled"}, "use treatment 'bucket'"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        train(cache, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_caches_of_draws_alone_and_of_none(tmp_path: Path) -> None:
    drawn = make_cache(tmp_path / "drawn", k=0)
    with pytest.raises(TrainError, match=r"hold draws and no top-k entries.*temperatures up to 2"):
        train(drawn, tmp_path / "run", temperature=2.0)
    assert train(drawn, tmp_path / "run", steps=1).complete
    with pytest.raises(TrainError, match="holds no draws"):
        train(make_cache(tmp_path / "plain", draws=0), tmp_path / "other", treatment="sampled")


def test_a_setting_that_is_none(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected settings: learning_rate"):
        train(cache, tmp_path, learning_rate=1.0)


def test_a_student_without_layers(cache: Cache, tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.table(tokens)
            return found

    with pytest.raises(TrainError, match="activation_checkpointing: Flat has no list of layers"):
        train(cache, tmp_path, Flat(), activation_checkpointing=True)
    report = train(cache, tmp_path, Flat())
    assert any("returns logits" in note for note in report.notes)


def test_losses_are_read_a_step_late(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a step before the next one is under way."""
    from fastkd.train import metrics
    from fastkd.train.trainer import Trainer

    events: list[str] = []
    make, record = Trainer._make, metrics.StepMetrics.record

    def made(self: Any, step: Any) -> Any:
        events.append(f"make {self.step + 1}")
        return make(self, step)

    def read_(self: Any) -> Any:
        events.append(f"read {self.step}")
        return record(self)

    monkeypatch.setattr(Trainer, "_make", made)
    monkeypatch.setattr(metrics.StepMetrics, "record", read_)
    train(cache, tmp_path, steps=4)
    assert events == ["make 1", "make 2", "read 1", "make 3", "read 2", "make 4", "read 3", "read 4"]


def test_the_command(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("llama").save_pretrained(tmp_path / "student")
    arguments = ["train", "--student", str(tmp_path / "student"), "--cache", cache.store.describe()]
    arguments += ["--out", str(tmp_path / "run"), "--steps", "4", "--batch-tokens", "60", "--evaluate-every", "2"]
    assert main([*arguments, "--control", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "done"
    assert events[-1]["difference"].keys() == events[-1]["evaluation"].keys()
    assert main(arguments) == 0
    assert "4 steps" in capsys.readouterr().out
    assert main([*arguments, "--rate", "1"]) == 1
    assert "rate: 0.0003 there, 1.0 here" in capsys.readouterr().err
    assert main([*arguments[:3], "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.train.trainer.Trainer._make", _killed(patch))
        assert main([*arguments[:6], str(tmp_path / "stopped"), *arguments[7:]]) == 75
    said = capsys.readouterr().out
    assert "stopped after step 1 of 4: the checkpoint of step 1 has all that was done. Run the same command" in said
    assert main([*arguments[:6], str(tmp_path / "stopped"), *arguments[7:]]) == 0


def _killed(patch: pytest.MonkeyPatch) -> Any:
    """A step in which SIGTERM comes."""
    import os
    import signal

    from fastkd.train.trainer import Trainer

    make = Trainer._make

    def made(self: Any, step: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(self, step)

    return made


def test_every_setting_is_named_by_the_command_and_says_what_it_is() -> None:
    import inspect
    from dataclasses import fields

    source = inspect.getsource(TrainSettings)
    for field in fields(TrainSettings):
        after = source.split(f"\n    {field.name}: ")[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name


def test_a_batch_is_refused_by_a_student_that_takes_less(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"this student takes 8\."):
        train(cache, tmp_path, config_of("gpt2", n_positions=8))
