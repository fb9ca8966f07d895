"""Students that learn from each other: each one's steps are its own, and what is kept and resumed is exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from train_cases import CAPTURE, SMALL, Tiny, bits, documents, llama, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.kernels import TopKConfig, linear_topk_targets
from fastkd.models.protocol import Hidden
from fastkd.report.make import make_report
from fastkd.settings import LiveSettings, TrainSettings
from fastkd.stream.batch import Step
from fastkd.train.checkpoint import newest
from fastkd.train.exchange import TEACHER, Exchange, everyone
from fastkd.train.inputs import make_source
from fastkd.train.metrics import read_metrics
from fastkd.train.mutual import named
from fastkd.train.objective import TokenKD
from fastkd.train.optimizer import clip_all_
from fastkd.train.peers import Peers
from fastkd.train.student import LoadedStudent, Student, of_module
from fastkd.train.trainer import Trainer

TOPK = TopKConfig(k=5, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("mutual") / "cache")


def train(cache: Any, out: Path, students: Any = None, **changes: Any) -> fastkd.MutualReport:
    students = {"a": Tiny(seed=1), "b": Tiny(seed=2)} if students is None else students
    return fastkd.mutual(students, cache, out, **{**SMALL, "k": 5, "learns": everyone(list(students)), **changes})


def peers_of(models: dict[str, nn.Module], learns: Any = None, topk: TopKConfig = TOPK, every: int = 0) -> Peers:
    made = {name: LoadedStudent(of_module(model, name), None) for name, model in models.items()}
    exchange = Exchange(learns or everyone(list(made)), topk, every=every)
    if every:
        exchange.copy({name: one.student for name, one in made.items()})
    return Peers(made, exchange)


def steps(cache: Cache, count: int, settings: TrainSettings) -> list[Step]:
    source = make_source(cache, settings)
    iterator = source.steps()
    found = [next(iterator) for _ in range(count)]
    source.close()
    return found


def weights(out: Path, name: str = "model") -> dict[str, Tensor]:
    found = newest(out)
    assert found is not None
    return found.tensors(name)


@pytest.mark.parametrize("kinds", ["hidden", "logits", "both"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_steps_of_two_are_those_of_each_with_the_others_targets_given(
    kinds: str, divergence: str, cache: Cache
) -> None:
    """Against loops written out: targets by `linear_topk_targets`, a student and an optimizer at a time."""
    settings = TrainSettings(batch_tokens=60, micro_tokens=32, rate=0.01, alpha=0.3, temperature=2.0, clip=0.5,
                             divergence=divergence)  # fmt: skip
    as_logits = {"hidden": (False, False), "logits": (True, True), "both": (False, True)}[kinds]
    models = {name: Tiny(seed=i, logits=z, bias=not i) for i, (name, z) in enumerate(zip("ab", as_logits, strict=True))}
    alone = {name: Student_of(model, settings) for name, model in models.items()}
    together = peers_of({name: copy_of(model) for name, model in models.items()})
    together.read(TokenKD.from_settings(settings))
    optimizers = {name: torch.optim.AdamW(one.parameters(), lr=0.01) for name, one in alone.items()}
    joint = torch.optim.AdamW(together.parameters(), lr=0.01)
    for step in steps(cache, 3, settings):
        for batch in step.micro_batches:
            losses = together(batch, num_items=step.count)
            losses["loss"].backward()
            given = {}
            for name, one in alone.items():
                with torch.no_grad():
                    rows = one.hidden(batch)[batch.targets.index]
                    targets = linear_topk_targets(rows, one.model.head, bias=one.model.head_bias, config=TOPK)
                given[name] = replace(targets, index=batch.targets.index)
            for name, other in (("a", "b"), ("b", "a")):
                own = alone[name](replace(batch, targets=given[other]), num_items=step.count)
                own["loss"].backward()
                for part in ("loss", "hard", "soft"):
                    torch.testing.assert_close(losses[f"{name}/{part}"], own[part].detach(), rtol=1e-5, atol=1e-6)
        norms = together.clip_(settings.clip)
        for name, one in alone.items():
            torch.testing.assert_close(norms[f"{name}/grad_norm"], clip_all_(one, settings.clip), rtol=1e-5, atol=1e-7)
            optimizers[name].step()
            optimizers[name].zero_grad()
        joint.step()
        joint.zero_grad()
        for name, one in alone.items():
            for (key, ours), theirs in zip(together.students[name].named_parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def copy_of(model: Tiny) -> Tiny:
    copy = Tiny(logits=model.gives_logits, bias=model.head_bias is not None)
    copy.load_state_dict(model.state_dict())
    return copy


class Alone(Student):
    """A student, and the hidden states of its model, whatever it returns."""

    model: Any

    def hidden(self, batch: Any) -> Tensor:
        logits, self.model.gives_logits = self.model.gives_logits, False
        states: Hidden = self.model(batch.input_ids)
        self.model.gives_logits = logits
        return states.states.flatten(0, 1)


def Student_of(model: Tiny, settings: TrainSettings) -> Alone:
    student = of_module(copy_of(model), "alone")
    student.__class__ = Alone
    student.read(TokenKD.from_settings(settings))
    assert isinstance(student, Alone)
    return student


def test_two_equal_peers_have_no_soft_gradient(cache: Cache) -> None:
    for logits in (False, True):
        peers = peers_of({name: Tiny(seed=1, logits=logits) for name in "ab"})
        peers.read(TokenKD.from_settings(TrainSettings(alpha=0.0, temperature=2.0)))
        (step,) = steps(cache, 1, TrainSettings(batch_tokens=60))
        losses = peers(step.micro_batches[0], num_items=step.count)
        losses["loss"].backward()
        assert abs(float(losses["a/soft"])) < 1e-6
        assert max(float(p.grad.abs().max()) for p in peers.parameters() if p.grad is not None) < 1e-6


def test_one_alone_is_training_on_labels(cache: Cache, tmp_path: Path) -> None:
    changes = SMALL | {"clip": 0.5, "alpha": 0.4}
    train(cache, tmp_path / "one", {"a": Tiny(seed=1)}, **changes)
    fastkd.train(Tiny(seed=1), cache, tmp_path / "labels", **{**changes, "alpha": 1.0})
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "labels")
    assert {name.removeprefix("model.a.") for name in ours} == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[f"model.a.{name}"], tensor, rtol=1e-5, atol=1e-6)


def test_three_with_a_cache_and_what_a_run_leaves(cache: Cache, tmp_path: Path) -> None:
    """Each learns from the mean over its sources; a teacher among them learns from labels alone."""
    students = {"a": Tiny(seed=1), "b": Tiny(seed=2, logits=True), "t": Tiny(seed=3)}
    learns = {"a": ("b", "t", TEACHER), "b": ("t",), "t": ()}
    changes = {"learns": learns, "control": True, "evaluate_every": 5}
    report = train(cache, tmp_path, students, **changes)
    assert report.complete
    lines = read_metrics(tmp_path)
    names = {f"{name}/{part}" for name in students for part in ("loss", "hard", "soft", "grad_norm")}
    assert names < lines[0].keys()
    assert lines[0]["t/soft"] == 0.0 < lines[0]["a/soft"]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][f"{name}/loss"] for name in students), rel=1e-6)
    norm = sum(lines[0][f"{name}/grad_norm"] ** 2 for name in students) ** 0.5
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for name in students:
        saved = load_exported(tmp_path / "students" / name)
        assert torch.equal(saved["head"], weights(tmp_path)[f"model.{name}.model.head"])
        one = report.students[name]
        assert one.control is not None
        assert one.verdict is not None
        assert one.verdict.difference["cross_entropy"].mean == pytest.approx(
            one.evaluation["cross_entropy"] - one.control.evaluation["cross_entropy"], abs=1e-6
        )
        assert (tmp_path / "control" / name / "run.json").exists()
    # the mean of all is no worse than all are on average
    mean = sum(one.evaluation["cross_entropy"] for one in report.students.values()) / 3
    assert report.ensemble["cross_entropy"] < mean
    assert report.run.evaluation["cross_entropy"] == pytest.approx(mean)
    document = json.loads((tmp_path / "run.json").read_text())
    assert list(document["students"]) == list(document["report"]["students"]) == list(students)
    page = Path(make_report([tmp_path])["report"]).read_text()
    for text in ("Did distillation help?", ", a</", ", t, control</", ", ensemble</"):
        assert text in page, text
    again = train(cache, tmp_path, students, **changes)
    assert again.complete
    assert again.students["a"].verdict == report.students["a"].verdict
    assert "a against control: " in again.text


def load_exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_control_is_the_plain_run_on_labels(cache: Cache, tmp_path: Path) -> None:
    train(cache, tmp_path / "two", control=True)
    fastkd.train(Tiny(seed=2), cache, tmp_path / "alone", **{**SMALL, "alpha": 1.0})
    assert bits(tmp_path / "two" / "control" / "b", 10) == bits(tmp_path / "alone", 10)


def test_copies_are_those_of_the_last_exchange(cache: Cache) -> None:
    """Codistillation: between exchanges the targets are of copies without dropout, which are not trained."""
    models = {"a": Tiny(seed=1, dropout=0.5), "b": Tiny(seed=2)}
    peers = peers_of({name: Tiny(seed=i, dropout=0.5) for i, name in enumerate("ab")}, every=2)
    peers.read(TokenKD.from_settings(TrainSettings(alpha=0.0)))
    assert all(not p.requires_grad for p in peers.live.parameters())
    peers.train()
    assert not any(module.training for module in peers.live.modules())
    optimizer = torch.optim.SGD([p for p in peers.parameters() if p.requires_grad], lr=0.1)
    frozen = {name: [p.clone() for p in peers.live.copies[name].parameters()] for name in models}
    for number, step in enumerate(steps(cache, 4, TrainSettings(batch_tokens=60)), 1):
        batch = step.micro_batches[0]
        found = peers.live(batch)
        again = peers.live(batch)
        assert torch.equal(found["a"].logprobs, again["a"].logprobs)
        with torch.no_grad():
            peers.students["a"].eval()
            expected = peers.live.targets_of(batch, peers.live.copies["a"].run(batch), peers.vocab_size)
            peers.students["a"].train()
        assert torch.equal(found["a"].ids, expected.ids)
        peers(batch, num_items=step.count)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        peers.live.after_step(peers, number)
        for name in models:
            ours = list(peers.live.copies[name].parameters())
            theirs = list(peers.students[name].parameters()) if number % 2 == 0 else frozen[name]
            assert all(map(torch.equal, ours, theirs))
            frozen[name] = [p.clone() for p in ours]


def test_exchange_every_step_is_learning_from_the_step_before(cache: Cache, tmp_path: Path) -> None:
    """Resumed between exchanges, too: copies are in the checkpoint."""
    for every in (1, 4):
        out = tmp_path / str(every)
        train(cache, out / "whole", every=every)
        stopped: dict[str, Any] = {"every": every, "steps": 10, "checkpoint_every": 3}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastkd.train.trainer.Trainer._flush_metrics", _dying(7))
            with pytest.raises(KeyboardInterrupt):
                train(cache, out / "parts", **stopped)
        assert train(cache, out / "parts", **stopped).run.resumed == 6
        assert bits(out / "parts", 10) == bits(out / "whole", 10)


def _dying(step: int) -> Any:
    flush = Trainer._flush_metrics

    def die(self: Any, **options: Any) -> None:
        if self.step >= step:
            raise KeyboardInterrupt
        flush(self, **options)

    return die


@pytest.mark.parametrize(
    ("students", "changes", "message"),
    [
        ({"a": Tiny(), "b": Tiny(vocab=97)}, {}, r"vocabularies of \d+ \(a\), 97 \(b\) outcomes; expected one"),
        ({}, {}, "got none; expected two or more"),
        ({"a": Tiny(), "b": Tiny()}, {"learns": {"a": ("c",), "b": ()}}, "got 'c' for a; expected some of b"),
        ({"a": Tiny(), "b": Tiny()}, {"learns": {"a": ("b",)}}, "learns: got a; expected the students a, b"),
        ({"a": Tiny(), "b": Tiny()}, {"match": ("1:1:mse:1",)}, "match: got '1:1:mse:1'.*have no cached features"),
        ({"a": Tiny(), "b": Tiny()}, {"k": 0}, "k: got 0"),
        ({"a": Tiny(), "b": Tiny()}, {"teacher": "ema:0.9"}, "teacher: got 'ema:0.9' for students that learn"),
        ({"a": Tiny(), "b": Tiny()}, {"exits": (1,)}, "exits: got"),
        ({"a": Tiny(), "b": Tiny()}, {"every": -1}, "every: got -1"),
        ({"a": Tiny(), "b": Tiny()}, {"one_each": True}, "one_each: got 1 processes for 2 students"),
        ({"a": Tiny(), "b": Tiny()}, {"divergence": "jsd", "treatment": "sampled"}, "sampled"),
    ],
)
def test_what_is_refused(
    students: dict[str, Any], changes: dict[str, Any], message: str, cache: Cache, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "ema" in message:
        monkeypatch.setattr("fastkd.train.live_inputs.find_kind", lambda teacher: teacher)
    with pytest.raises((TrainError, fastkd.KDError), match=message):
        train(cache, tmp_path / "run", students, **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_changed_settings_on_resume_are_refused(cache: Cache, tmp_path: Path) -> None:
    train(cache, tmp_path)
    changed: list[dict[str, Any]] = [
        {"k": 4}, {"every": 3}, {"learns": {"a": ("b",), "b": ()}}, {"rate": 0.1}, {"draws": 2}
    ]  # fmt: skip
    for changes in changed:
        with pytest.raises(TrainError, match=r"begun with other settings|in this student alone"):
            train(cache, tmp_path, **changes)
    with pytest.raises(TrainError, match=r"begun with other settings .live: "):
        train(cache, tmp_path, {"a": Tiny(seed=1), "c": Tiny(seed=2)}, learns={"a": ("c",), "c": ("a",)})


def test_names_and_new_weights(cache: Cache, tmp_path: Path) -> None:
    """A folder of a config alone, given twice, has two names and other weights each."""
    assert list(named(["x/small.v1", "y/small.v1", "train_cases:tiny", "keys", Tiny()])) == [
        "small_v1", "small_v1-2", "tiny", "keys_", "Tiny"
    ]  # fmt: skip
    llama().save_pretrained(tmp_path / "new")
    students = named([tmp_path / "new", tmp_path / "new"])
    report = train(cache, tmp_path / "run", students, steps=1)
    found = weights(tmp_path / "run")
    ours, theirs = (found[f"model.{name}.model.model.embed_tokens.weight"] for name in ("new", "new-2"))
    assert not torch.allclose(ours, theirs, atol=1e-3)
    assert not any("equal weights" in note for note in report.run.notes)
    same = train(cache, tmp_path / "same", {"a": Tiny(seed=1), "b": Tiny(seed=1)}, steps=1)
    assert "a and b begin with equal weights; without dropout, they stay equal." in same.run.notes


def test_from_data_alone_and_beside_a_teacher(cache: Cache, tmp_path: Path) -> None:
    """The data are divided as for one student; draws differ from step to step, and are drawn again when resumed."""
    changes: dict[str, Any] = {**SMALL, **CAPTURE, "k": 5, "draws": 2, "evaluate_every": 5, "steps": 6}
    students = {"a": Tiny(seed=1), "b": Tiny(seed=2)}
    report = fastkd.mutual(students, None, tmp_path / "data", data=documents(), control=True, **changes)
    assert report.complete
    assert report.students["a"].verdict is not None
    assert {"cross_entropy", "accuracy"} <= report.ensemble.keys()
    again = fastkd.mutual(students, None, tmp_path / "data", data=documents(), control=True, **changes)
    assert again.students["a"].verdict == report.students["a"].verdict
    page = Path(make_report([tmp_path / "data"])["report"]).read_text()  # without a row of a teacher
    assert ", a, control</" in page
    assert "What its targets know" not in page
    live = LiveSettings(**CAPTURE)
    fastkd.train(
        Tiny(seed=1), None, tmp_path / "alone", data=documents(), live=live, **{**SMALL, "steps": 6, "alpha": 1.0}
    )
    assert bits(tmp_path / "data" / "control" / "a", 6) == bits(tmp_path / "alone", 6)
    whole = bits(tmp_path / "data", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.train.trainer.Trainer._flush_metrics", _dying(4))
        with pytest.raises(KeyboardInterrupt):
            fastkd.mutual(students, None, tmp_path / "parts", data=documents(), checkpoint_every=1, **changes)
    fastkd.mutual(students, None, tmp_path / "parts", data=documents(), checkpoint_every=1, **changes)
    assert bits(tmp_path / "parts", 6) == whole
    # a third source: a teacher that is not trained
    own = {"teacher": Tiny(seed=7), "teacher_k": 3, "teacher_draws": 1}
    taught = fastkd.mutual(students, None, tmp_path / "taught", data=documents(), **own, **changes)
    assert taught.complete
    assert bits(tmp_path / "taught", 6) != whole
    identity = json.loads((tmp_path / "taught" / "run.json").read_text())["live"]["identity"]
    assert (identity["k"], identity["draws"]) == (3, 1)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fastkd", "mutual"])
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"tokens": one}) for one in documents()))
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--context", "16", "--held-out", "0.2", "--steps", "3"]
    arguments += ["--shard-positions", "48", "--batch-tokens", "60", "--rate", "0.01"]
    two = ["mutual", "--student", "train_cases:tiny", "--student", "train_cases:dropping", "--control", *arguments]
    assert main([*two, "--out", str(tmp_path / "two"), "--k", "4"]) == 0
    said = capsys.readouterr().out
    assert "tiny against control: " in said
    assert f"students: {tmp_path / 'two' / 'students'}" in said
    assert sorted(path.name for path in (tmp_path / "two" / "students").iterdir()) == ["dropping", "tiny"]
    teacher = ["train", "--student", "train_cases:tiny", "--teacher", "train_cases:dropping", "--train-teacher"]
    assert main([*teacher, *arguments, "--out", str(tmp_path / "both"), "--k", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["students"]) == {"tiny", "dropping"}
    (last,) = [line for line in read_metrics(tmp_path / "both") if line["step"] == 3 and "loss" in line]
    assert last["dropping/soft"] == 0.0 < last["tiny/soft"]
    for wrong, message in (
        (["train", "--student", "s", "--train-teacher", *arguments], "--train-teacher: got no teacher"),
        ([*teacher, "--cache", str(tmp_path)], "--train-teacher: got a cache"),
        (["mutual", "--student", "s", "--student", "t", "--every", "-2", *arguments], "--every -2: expected a number"),
        (["mutual", "--student", "s", "--student", "t"], "expected a cache, or the data"),
    ):
        assert main([*wrong, "--out", str(tmp_path / "wrong")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
