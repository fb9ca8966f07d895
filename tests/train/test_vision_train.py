"""Training and evaluation on caches of images: against a loop written out, divided, killed, and by the command."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_jobs
from safetensors.torch import load_file
from torch import Tensor, nn
from train_cases import bits
from vision_cases import CLASSES, COPIES, SMALL, Net, examples, make_cache

import fastkd
from fastkd import DistillLoader, kd_loss
from fastkd.cache import Cache, open_cache
from fastkd.cli.main import main
from fastkd.errors import StreamError, TrainError
from fastkd.evaluate.api import evaluate
from fastkd.kernels.lm_head import LMHead
from fastkd.models.protocol import Hidden
from fastkd.train.checkpoint import newest
from fastkd.train.metrics import read_metrics
from fastkd.utils.signals import Stop


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    make_cache(folder / "cache")
    return folder


@pytest.fixture(scope="module")
def cache(place: Path) -> Cache:
    return open_cache(place / "cache")


def train(cache: Any, out: Path, student: Any = None, **changes: Any) -> fastkd.TrainReport:
    return fastkd.train(student or Net(), cache, out, **{"data": examples(), **SMALL, **changes})


def weights(run: Path) -> dict[str, Tensor]:
    found = newest(run)
    assert found is not None
    assert found.step == SMALL["steps"]
    return found.tensors("model")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_ten_steps_against_a_loop_written_out(cache: Cache, tmp_path: Path) -> None:
    """In micro-batches; and in whole steps, with the reference loss and torch's own AdamW."""
    settings = {"rate_schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "clip": None, "temperature": 2.0}
    train(cache, tmp_path, Net(dtype=torch.float64), alpha=0.25, **settings)
    model = Net(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL["rate"], betas=(0.9, 0.95), weight_decay=0.0)
    loader = DistillLoader(cache, batch_size=9, micro_tokens=None, data=examples())
    for _, step in zip(range(10), loader.steps(), strict=False):
        (batch,) = step.micro_batches
        optimizer.zero_grad()
        kd_loss(
            model(batch.inputs), batch.targets, batch.labels, alpha=0.25, temperature=2.0, impl="reference"
        ).loss.backward()
        optimizer.step()
    loader.close()
    # the rate and the temperature are float32 tensors
    assert_close(weights(tmp_path), {f"model.{n}": p.detach() for n, p in model.named_parameters()}, 1e-6)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"])
def test_micro_batches_and_two_ranks_come_to_what_one_process_does(place: Path, tmp_path: Path, kind: str) -> None:
    student, cache = "vision_cases:double", place / "cache"
    on_images, job = train_jobs.on_images, train_jobs.train
    on_images(job, student, cache, tmp_path / "one", SMALL | {"micro_tokens": 1000})
    on_images(job, student, cache, tmp_path / "parts", SMALL)
    train_jobs.run(on_images, job, student, cache, tmp_path / "two", SMALL | {"parallel": kind}, ranks=2)
    for name in ("parts", "two"):
        assert_close(weights(tmp_path / name), weights(tmp_path / "one"), 1e-9)


def test_two_ranks_stopped_go_on_as_one(place: Path, tmp_path: Path) -> None:
    given = ("vision_cases:double", place / "cache", tmp_path / "run", SMALL)
    train_jobs.run(train_jobs.on_images, train_jobs.train_and_stop, *given, 5, ranks=2)
    train_jobs.on_images(train_jobs.train, *given)
    train_jobs.on_images(train_jobs.train, *given[:2], tmp_path / "whole", SMALL)
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), 1e-9)


def test_killed_and_gone_on_with_it_comes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    given = ("vision_cases:dropping", place / "cache")
    changes = SMALL | {"checkpoint_every": 2}

    def result(run: Path) -> tuple[Any, ...]:
        lines = [[line[n] for n in ("step", "loss", "hard", "soft", "grad_norm")] for line in read_metrics(run)]
        return bits(run, SMALL["steps"]), repr(lines)

    train_jobs.run(train_jobs.on_images, train_jobs.train, *given, tmp_path / "whole", changes)
    for moment in (17, 40):
        out = tmp_path / str(moment)
        dying = train_jobs.start(train_jobs.on_images, train_jobs.train_and_die, *given, out, changes, moment)
        assert train_jobs.finish(dying) == [-signal.SIGKILL]
        train_jobs.run(train_jobs.on_images, train_jobs.train, *given, out, changes)
        assert result(out) == result(tmp_path / "whole"), f"killed at moment {moment}"


def test_evaluation_by_image(cache: Cache) -> None:
    """Each measure against its definition, over images held out; windows are images."""
    student, data = Net(seed=3), examples()
    found = evaluate(student_of(student), cache, data=data, batch_tokens=7)
    numbers, seeds, ids, logprobs, draws = [], [], [], [], []
    for index in cache.shards:
        arrays = cache.read_shard(index)
        numbers.append(arrays["example"])
        seeds.append(arrays["augmentation_seed"])
        for rows, name in ((ids, "ids"), (logprobs, "logprobs"), (draws, "draws")):
            rows.append(arrays[name])
    held_out = 12 * COPIES  # a fifth of 60, in the last shards
    of = {name: np.concatenate(column)[-held_out:] for name, column in
          {"n": numbers, "s": seeds, "ids": ids, "logprobs": logprobs, "draws": draws}.items()}  # fmt: skip
    student.eval()
    with torch.no_grad():
        said = student(data.read(of["n"], of["s"])).log_softmax(1)
    labels = torch.from_numpy(data.labels(of["n"]))
    intervals = found.intervals()
    assert found.windows == 12
    assert found.count == held_out
    assert intervals["cross_entropy"].mean == pytest.approx(float(-said.gather(1, labels[:, None]).mean()), abs=1e-5)
    assert intervals["accuracy"].mean == pytest.approx(float((said.argmax(1) == labels).float().mean()))
    best = torch.from_numpy(np.take_along_axis(of["ids"], of["logprobs"].argmax(1)[:, None], 1))[:, 0]
    assert intervals["agreement"].mean == pytest.approx(float((said.argmax(1) == best).float().mean()), abs=0.1)
    head = torch.from_numpy((of["logprobs"] > -np.inf) & (of["draws"] == 0))
    q = torch.from_numpy(of["logprobs"]).masked_fill(~head, -torch.inf).exp()
    p = said.exp().gather(1, torch.from_numpy(of["ids"]).long()) * head
    terms = torch.where(q > 0, q * (q / p).log(), 0).sum(1)
    rest_q, rest_p = 1 - q.sum(1), 1 - p.sum(1)
    kl = terms + torch.where(rest_q > 1e-6, rest_q * (rest_q / rest_p).log(), 0)
    assert intervals["kl_bucket"].mean == pytest.approx(float(kl.mean()), abs=0.02)
    assert all(interval.half > 0 for name, interval in intervals.items() if name in ("cross_entropy", "kl_bucket"))
    assert {"ece", "kl_sampled"} <= intervals.keys()


def student_of(model: nn.Module) -> nn.Module:
    from fastkd.train.student import of_module

    return of_module(model, "net", examples().first())


def test_a_run_with_its_control(cache: Cache, tmp_path: Path) -> None:
    report = train(cache, tmp_path, evaluate_every=5, control=True)
    assert report.complete
    assert report.control is not None
    assert report.control.evaluation.keys() == report.evaluation.keys() >= {"cross_entropy", "kl_bucket", "accuracy"}
    hard, control = (
        [line["hard"] for line in read_metrics(run) if "hard" in line] for run in (tmp_path, tmp_path / "control")
    )
    assert hard[0] == control[0]  # the same student, the same pixels
    assert hard[1:] != control[1:]
    made = Net(seed=9)
    made.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))
    assert_close({f"model.{n}": p.detach() for n, p in made.named_parameters()}, weights(tmp_path), 0.0)


def test_arms_from_one_read_are_their_own_trainings(cache: Cache, tmp_path: Path) -> None:
    settings = {n: v for n, v in SMALL.items() if n != "evaluate_every"}
    report = fastkd.sweep(Net(), cache, tmp_path / "sweep", {"alpha": [0.0, 1.0]}, data=examples(), seeds=1, **settings)
    assert report.complete
    train(cache, tmp_path / "alone", alpha=0.0)
    assert_close(weights(tmp_path / "sweep" / "alpha=0" / "seed=0"), weights(tmp_path / "alone"), 0.0)


class Stated(nn.Module):
    """Hidden states and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.norm = nn.BatchNorm1d(36)
        self.layer = nn.Linear(36, 5)

    def forward(self, images: Tensor) -> Hidden:
        return Hidden(self.layer(self.norm(images.flatten(1))), LMHead(self.net.head.weight, self.net.head.bias))


def test_hidden_states_and_batch_norms(cache: Cache, tmp_path: Path) -> None:
    student = Stated()
    report = train(cache, tmp_path / "whole", student, evaluate_every=10)
    assert report.complete
    assert any("batch norms take the statistics of each micro-batch" in note for note in report.notes)
    stop = Stop()
    stop()
    while train(cache, tmp_path / "parts", student, evaluate_every=10, stop=stop).status == 75:
        pass  # a step at a time
    found = weights(tmp_path / "parts")
    assert found["model.norm.running_var"].std() > 0
    assert_close(found, weights(tmp_path / "whole"), 0.0)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 6)), "got a vocabulary of 6; expected at least 7"),
        (nn.Sequential(nn.Flatten(), nn.Linear(35, 7)), r"fails on an example of shape \(1, 1, 6, 6\) torch.float32"),
        (nn.Linear(6, CLASSES), r"got Tensor of shape \(1, 1, 6, 7\) from the model; expected logits \[B, V\]"),
        (nn.Flatten(), "has no parameters"),
        ("some/folder", "got 'some/folder' for a cache of examples; expected a torch module"),
    ],
)  # fmt: skip
def test_students_that_do_not_fit(student: Any, message: str, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        train(cache, tmp_path, student)


def test_other_data_and_other_labels_are_not_gone_on_with(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="the data set that"):
        train(cache, tmp_path / "run", data=examples(seed=1))
    assert not (tmp_path / "run").exists()
    train(cache, tmp_path / "run")
    with pytest.raises(StreamError, match=r"labels: '\w+' there, '\w+' here"):
        train(cache, tmp_path / "run", data=examples(labels=[0] * 60))


def test_the_command(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "--student", "vision_cases:dropping", "--cache", cache.store.describe(), "--out", str(tmp_path)]
    given += ["--batch-size", "9", "--epochs", "2", "--control"]
    assert main([*given, "--data", "vision_cases:examples", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["steps"] == 12
    assert last["difference"].keys() == last["evaluation"].keys()
    assert main(given) == 1
    assert "data: got None with" in capsys.readouterr().err
    assert main([*given, "--data", "vision_cases:CLASSES"]) == 1
    assert "the function raised TypeError" in capsys.readouterr().err
    assert main([*given, "--data", "images.parquet"]) == 1
    assert "--data: got 'images.parquet'; expected the module:factory" in capsys.readouterr().err
