"""Checkpoints are there whole or not at all, and what is left of others is found out and removed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_cases import SMALL, Tiny, bits, make_cache, write_version_1

import fastkd
from fastkd.errors import TrainError
from fastkd.settings import TrainSettings
from fastkd.train.checkpoint import (
    clean,
    load_model,
    load_optimizer,
    model_tensors,
    newest,
    optimizer_tensors,
    prune,
    read,
    steps_of,
    write,
)
from fastkd.train.metrics import MetricsLog
from fastkd.train.optimizer import clip_, decay_groups, make_optimizer
from fastkd.utils import atomic
from fastkd.utils.atomic import lock, write_folder, write_text
from fastkd.utils.signals import Stop


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return {
        "model": {"a": torch.randn(3, 5, generator=random), "b": torch.randn(4, generator=random).double()},
        "optimizer": {"a.step": torch.tensor(7.0), "a.exp_avg": torch.randn(3, 5, generator=random).bfloat16()},
    }


def file_of(run: Path, step: int, name: str) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / name


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, 3, tensors(3), {"settings": {"rate": 0.1}, "text": "ü"})
    write(tmp_path, 12, tensors(12), {"settings": {}})
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (12, {"settings": {}})
    for name, wanted in tensors(12).items():
        read_back = found.tensors(name)
        assert read_back.keys() == wanted.keys()
        for key in wanted:
            assert read_back[key].dtype == wanted[key].dtype
            assert torch.equal(read_back[key], wanted[key])
    older = read(tmp_path, 3)
    assert not isinstance(older, str)
    assert older.state["text"] == "ü"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_one_is_known_and_an_older_one_taken(name: str, harm: str, tmp_path: Path) -> None:
    write(tmp_path, 3, tensors(3), {})
    write(tmp_path, 12, tensors(12), {})
    path = file_of(tmp_path, 12, name)
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1 if harm == "flip" else 0
        path.write_bytes(data[: len(data) - (harm == "cut")])
    warnings: list[str] = []
    found = newest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 3
    assert "step-00000012" in warnings[0]
    assert "older" in warnings[0]


STATE: dict[str, Any] = {
    "settings": {"alpha": 0.5, "steps": 10, "layout": "padded", "adam_betas": [0.9, 0.95], "alpha_end": None},
    "loader": {"version": 1, "epoch": 3, "sequences": 17, "positions": 0, "steps": 6, "fingerprint": {"seed": 0}},
    "best": {"step": 2, "of": {"9": 1, "10": 2}, "measure": "cross_entropy", "value": 6.083333333333333},
    "metrics": {"loss": 1.5e-07},
}  # fmt: skip


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_any_bit_of_its_state(every: int, tmp_path: Path) -> None:
    """The older one is taken, with a warning; or the bit changes nothing that is read, as in a space."""
    write(tmp_path, 3, tensors(3), STATE)
    write(tmp_path, 12, tensors(12), STATE)
    path = file_of(tmp_path, 12, "state.json")
    data, noticed = path.read_bytes(), 0
    for bit in range(0, 8 * len(data), every):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        warnings: list[str] = []
        found = newest(tmp_path, warnings.append)
        assert found is not None
        assert found.state == STATE
        assert bool(warnings) == (found.step == 3)
        noticed += found.step == 3
    assert noticed > 0.98 * len(range(0, 8 * len(data), every))


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.soak)])
def test_any_bit_of_the_log(every: int, tmp_path: Path) -> None:
    """A resumed run has the same log, or says that it was changed."""
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 3.25 / step, "rate": 1e-05, "seconds": 0.1234567890123})
    log.write({"step": 3, "evaluation": {"cross_entropy": 8.25}})
    mark = log.mark()
    log.write({"step": 4, "loss": 0.5, "rate": 1e-05})
    log.close()
    path = tmp_path / "metrics.jsonl"
    data, noticed = path.read_bytes(), 0
    kept = b"".join(data.splitlines(keepends=True)[:4])
    for bit in range(0, 8 * len(data), every):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        again = MetricsLog(tmp_path, 3, mark=mark)
        again.close()
        assert again.changed == (path.read_bytes() != kept), bit
        noticed += again.changed
    assert noticed > 0.6 * len(range(0, 8 * len(data), every))


def test_a_torn_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0})
    mark = log.mark()
    log.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 2, "lo')
    again = MetricsLog(tmp_path, 1, mark=mark)
    again.close()
    assert not again.changed  # a kill tears lines of steps that will be made again
    assert path.read_text() == whole
    path.write_text(whole[:9])
    again = MetricsLog(tmp_path, 1, mark=mark)
    again.close()
    assert again.changed


@pytest.mark.parametrize(("pattern", "by"), [(b'"epoch": 0', b'"epoch": 1'), (b'"loader"', b'"loaddr"')])
def test_a_run_resumes_from_an_older_one(pattern: bytes, by: bytes, tmp_path: Path, capsys: Any) -> None:
    """With other weights nowhere, though the state of the newest one names another position, or lacks it."""
    cache = make_cache(tmp_path / "cache")
    changes = SMALL | {"steps": 6, "checkpoint_every": 2}
    fastkd.train("train_cases:dropping", cache, tmp_path / "whole", **changes)
    stop, out = Stop(), tmp_path / "run"

    def measure(student: Any) -> dict[str, float]:
        stop()
        return {"cross_entropy": 1.0}

    stopped: dict[str, Any] = {"evaluate": measure, "stop": stop}
    fastkd.train("train_cases:dropping", cache, out, **stopped, **(changes | {"evaluate_every": 4}))
    assert steps_of(out) == [4, 5]
    path = file_of(out, 5, "state.json")
    data = path.read_bytes()
    assert pattern in data
    path.write_bytes(data.replace(pattern, by))
    report = fastkd.train("train_cases:dropping", cache, out, progress="lines", **changes)
    assert report.resumed == 4
    assert (
        "step-00000005: state.json cannot be read (it has changed since it was written); an older checkpoint is used"
        in (capsys.readouterr().err)
    )
    assert bits(out, 6) == bits(tmp_path / "whole", 6)


def test_where_none_is_whole_nothing_begins_anew_by_itself(tmp_path: Path) -> None:
    write(tmp_path, 3, tensors(3), {})
    file_of(tmp_path, 3, "__0_0.distcp").unlink()
    with pytest.raises(TrainError, match=r"step-00000003: __0_0.distcp cannot be read .* to start anew"):
        newest(tmp_path)


@pytest.mark.parametrize("version", [0, 3])
def test_another_version(version: int, tmp_path: Path) -> None:
    write(tmp_path, 3, tensors(3), {})
    path = file_of(tmp_path, 3, "state.json")
    document = json.loads(path.read_text()) | {"version": version}
    del document["sha256"]
    path.write_text(json.dumps(document))
    with pytest.raises(TrainError, match=f"got version {version}; expected at most 2"):
        newest(tmp_path)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step, tensors(step), {})
    prune(tmp_path, keep=2, best=2, last=5)
    assert steps_of(tmp_path) == [2, 4, 5]
    # one of a step not yet come to is damaged: it was passed over
    prune(tmp_path, keep=1, best=None, last=4)
    assert steps_of(tmp_path) == [4]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3, tensors(3), {})

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 4, tensors(4), {})
    assert steps_of(tmp_path) == [3]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 3, tensors(3), {})
    for name in (".step-00000004.part", ".step-00000002.gone.part"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_text("half")
    (tmp_path / ".run.json.part").write_text("half")
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 3
    clean(tmp_path)
    assert [path.name for path in tmp_path.rglob(".*")] == [".metadata"]
    assert steps_of(tmp_path) == [3]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = atomic._sync, os.rename

    def synced(path: Path) -> None:
        events.append(path.name)
        sync(path)

    def renamed(source: Any, target: Any) -> None:
        events.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(atomic, "_sync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    write(tmp_path, 3, tensors(3), {})
    events = [event for event in events if event != "-> .metadata"]  # DCP's own rename, within the folder
    at = events.index("-> step-00000003")
    assert set(events[:at]) == {"__0_0.distcp", ".metadata", "state.json", ".step-00000003.part"}
    assert events[at - 1] == ".step-00000003.part"
    assert events[at + 1 :] == ["checkpoints"]


def test_folders_and_files_are_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_folder(tmp_path / "folder", lambda place, text=text: (place / text).write_text(text))
        write_text(tmp_path / "file", text)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]
    assert (tmp_path / "file").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_two_cannot_train_into_one_folder(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(TrainError, match="another process trains into it"):
        lock(tmp_path)
    os.close(held)
    os.close(lock(tmp_path))


def trained(seed: int) -> tuple[Tiny, torch.optim.Optimizer]:
    """A student whose LM head is its embedding, and a parameter that no gradient has reached."""
    model = Tiny(seed=seed, logits=True)
    model.embedding.weight = model.head
    model.unused = nn.Parameter(torch.ones(3))
    return model, make_optimizer(model, TrainSettings(), torch.device("cpu"))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(12)[None]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("version", [1, 2])
def test_weights_and_optimizer_state_are_restored(version: int, tmp_path: Path) -> None:
    """Shared weights are stored once, and the optimizer's next step is the same."""
    ours, theirs = trained(0), trained(5)
    take_step(*ours)
    groups = {"model": model_tensors(ours[0]), "optimizer": optimizer_tensors(ours[1], ours[0])}
    assert "head" not in groups["model"] or "embedding.weight" not in groups["model"]
    assert not any(name.startswith("unused") for name in groups["optimizer"])
    (write_version_1 if version == 1 else write)(tmp_path, 1, groups, {})
    found = newest(tmp_path)
    assert found is not None
    assert found.version == version
    load_model(found, theirs[0])
    load_optimizer(found, theirs[1], theirs[0])
    for pair in (ours, theirs):
        take_step(*pair)
    for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(a, b)
    again = optimizer_tensors(theirs[1], theirs[0])
    for name, state in optimizer_tensors(ours[1], ours[0]).items():
        assert torch.equal(state, again[name]), name


def test_another_student_is_named(tmp_path: Path) -> None:
    for name, model in (("plain", Tiny()), ("biased", Tiny(bias=True))):
        write(tmp_path / name, 3, {"model": model_tensors(model)}, {})
    plain, biased = newest(tmp_path / "plain"), newest(tmp_path / "biased")
    assert plain is not None
    assert biased is not None
    with pytest.raises(
        TrainError, match=r"plain.*: head is \(96, 12\) torch.float32 there, \(99, 12\)|embedding.weight"
    ):
        load_model(plain, Tiny(vocab=99))
    with pytest.raises(TrainError, match=r"head_bias is in this student alone"):
        load_model(plain, Tiny(bias=True))
    with pytest.raises(TrainError, match=r"head_bias is in the checkpoint's student alone"):
        load_model(biased, Tiny())


def test_what_decays() -> None:
    model = Tiny(bias=True)
    model.layers[0].weight.requires_grad_(False)
    decaying, rest = decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {"head", "layers.1.weight", "layers.2.weight"}
    assert {names[id(p)] for p in rest["params"]} == {
        "embedding.weight", "head_bias", "norm.weight", "norm.bias", *(f"layers.{i}.bias" for i in range(3)),
    }  # fmt: skip
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("most", [None, 0.5])
def test_clipping(most: float | None) -> None:
    model = Tiny(logits=True)
    model(torch.arange(12)[None]).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = clip_(model.parameters(), most)
    torch.testing.assert_close(norm, before.norm())
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(after.norm(), before.norm() if most is None else torch.tensor(0.5), rtol=1e-4, atol=0)
