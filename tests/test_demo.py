"""The demo: its pure parts, and all of it on a small model of plain torch."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastkd import cli, linear_topk_targets
from fastkd.cache import CacheError, CacheSpec, open_cache
from fastkd.cache.scan import shard_key
from fastkd.demo import language as demo
from fastkd.demo import smollm2
from fastkd.healing import CausalModel, Scores, kept_layers, paired, targets_of
from fastkd.intervals import interval, t_quantile
from fastkd.settings import DemoSettings

VOCAB, WIDTH, LAYERS = 80, 16, 5
TEXT = "".join(chr(33 + (i * i // 7) % 70) for i in range(16 * 40))


class Layer(nn.Module):
    """Mixes each position with those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_BLD: Tensor) -> Tensor:
        before = x_BLD.cumsum(1) / torch.arange(1, x_BLD.shape[1] + 1)[:, None]
        return x_BLD + torch.tanh(self.linear(torch.cat([x_BLD, before], 2)))


class Tiny(CausalModel):
    """Embedding, layers and a tied head, the same weights each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.stack = nn.ModuleList(Layer() for _ in range(LAYERS))

    @property
    def head(self) -> Tensor:
        return self.embedding.weight

    @property
    def layers(self) -> nn.ModuleList:
        return self.stack

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.stack:
            x = layer(x)
        return x

    def keep_layers(self, numbers: list[int]) -> None:
        self.stack = nn.ModuleList(self.stack[i] for i in numbers)


class TinyTeacher:
    """A teacher that counts the positions it is run on, and dies where it is told to."""

    name = "tiny"
    vocab_size = VOCAB

    def __init__(self, dies_after: int | None = None) -> None:
        self.seen: list[int] = []
        self.dies_after = dies_after

    def tokens(self, text: str) -> Any:
        return np.array([ord(c) - 33 for c in text])

    def model(self) -> CausalModel:
        model, whole = Tiny(), Tiny.hidden

        def hidden(tokens: Tensor) -> Tensor:
            if len(model.layers) == LAYERS:
                if self.dies_after is not None and len(self.seen) >= self.dies_after:
                    raise KeyboardInterrupt
                self.seen.append(tokens.numel())
            return whole(model, tokens)

        model.hidden = hidden  # type: ignore[method-assign]
        return model


@pytest.fixture
def settings(tmp_path: Path) -> DemoSettings:
    return DemoSettings(
        tmp_path / "demo", window=16, train_windows=10, held_out=5, shard_windows=4, k=6, draws=4, steps=12, rate=1e-3
    )


def run(settings: DemoSettings, teacher: TinyTeacher | None = None) -> Any:
    return demo.run_demo(settings, teacher or TinyTeacher(), TEXT, demo.Clock())


def shards(settings: DemoSettings) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (settings.out / "cache").glob("shards/*")}


# The parts


def test_windows_are_chosen_without_overlap(settings: DemoSettings) -> None:
    ids = np.arange(16 * 40 + 5)
    found = demo.chosen_windows(ids, settings)
    assert found.shape == (15, 16)
    assert np.unique(found[:, 0]).size == 15
    assert (found[:, 0] % 16 == 0).all()
    assert (np.diff(found, axis=1) == 1).all()
    assert (found == demo.chosen_windows(ids, settings)).all()
    assert (found != demo.chosen_windows(ids, replace(settings, seed=4))).any()
    for train_windows, apart in ((36, 5), (0, 5), (5, 0)):
        with pytest.raises(CacheError, match="windows: found"):
            demo.chosen_windows(ids, replace(settings, train_windows=train_windows, held_out=apart))


def test_no_paragraph_stands_twice_in_the_text() -> None:
    paragraphs = [" ".join(p.split()) for p in demo.demo_text().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_every_fifth_layer_goes() -> None:
    assert kept_layers(10, 5) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert len(kept_layers(30, 5)) == 24
    model = Tiny()
    third = model.layers[2]
    model.keep_layers(kept_layers(LAYERS, 3))
    assert len(model.layers) == 3
    assert model.layers[1] is third


def test_order_takes_each_window_before_any_again(settings: DemoSettings) -> None:
    order = demo.training_order(replace(settings, train_windows=6, steps=9, batch_windows=2))
    flat = [window for step in order for window in step]
    assert [len(step) for step in order] == [2] * 9
    assert [sorted(flat[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3


@pytest.mark.parametrize(("df", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (11, 2.201), (30, 2.042)])
def test_t_quantile(df: int, value: float) -> None:
    assert t_quantile(df) == pytest.approx(value, abs=0.025)


def test_intervals_are_of_the_differences() -> None:
    ours, theirs = [1.0, 5.0, 9.0, 13.0], [2.0, 6.5, 9.5, 14.0]
    found = paired(Scores(ours, ours, ours), Scores(theirs, theirs, theirs))
    assert found["kl"] == found["agreement"] == interval([-1.0, -1.5, -0.5, -1.0])
    mean, half = found["cross_entropy"]
    assert mean == -1.0
    # 3.182 · s / √4, whatever the windows differ by among themselves
    assert half == pytest.approx(3.182 * (0.5 / 3) ** 0.5 / 2, rel=0.01)
    assert interval([3.0]) == (3.0, float("inf"))


def test_rows_that_were_not_captured_get_no_target() -> None:
    targets = linear_topk_targets(torch.randn(4, WIDTH), torch.randn(VOCAB, WIDTH), 5)
    arrays = {name: getattr(targets, name).numpy().copy() for name in ("ids", "logprobs", "tail", "outcomes")}
    arrays["logprobs"][1] = -np.inf
    found = targets_of(CacheSpec(VOCAB, 5), arrays)
    assert found.index is not None
    assert found.index.tolist() == [0, 2, 3]
    assert torch.equal(found.ids, targets.ids[found.index])


# All of it


def test_demo(settings: DemoSettings) -> None:
    teacher = TinyTeacher()
    report = run(settings, teacher)
    assert json.loads((settings.out / "report.json").read_text()) == report
    scores = report["scores"]
    # once for the cache and once for its own scores on what is held out; never in training
    assert sum(teacher.seen) == (15 + 5) * 16
    assert report["captured_now"] == report["positions"] == 15 * 16
    assert open_cache(settings.out / "cache").sealed
    assert 0 <= scores["teacher"]["kl"] < 1e-3 < scores["healed"]["kl"] < scores["damaged"]["kl"]
    assert scores["healed"]["kl"] < scores["control"]["kl"]
    assert scores["teacher"]["agreement"] == 1
    assert all(len(v) == 5 for s in report["windows"].values() for v in s.values())
    text = demo.text_of(report)
    for word in ("teacher ran on 240", "damaged", "healed - control", "bytes each", "report.json"):
        assert word in text


def test_a_second_run_never_runs_the_teacher(settings: DemoSettings, capfd: pytest.CaptureFixture[str]) -> None:
    first = run(settings)
    teacher = TinyTeacher(dies_after=0)
    capfd.readouterr()
    second = run(settings, teacher)
    assert teacher.seen == []
    assert "nothing to do, the teacher is not run" in capfd.readouterr().err
    assert "teacher did not run" in demo.text_of(second)
    for same in ("windows", "losses", "bytes"):
        assert second[same] == first[same]


@pytest.mark.parametrize("committed", [0, 1, 2, 3, 4])
def test_an_interrupted_capture_goes_on(settings: DemoSettings, tmp_path: Path, committed: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings, TinyTeacher(dies_after=committed))
    # a shard that the teacher was done with may still have waited to be written
    there = {int(name.split(".")[0]) for name in shards(settings)}
    assert there <= set(range(committed))
    teacher = TinyTeacher()
    report = run(settings, teacher)
    # ten windows to train on and five held out, four a shard
    left = sum((4, 4, 2, 4, 1)[shard] for shard in there) * 16
    assert sum(teacher.seen) == (15 + 5) * 16 - left
    whole = run(replace(settings, out=tmp_path / "whole"))
    assert report["windows"] == whole["windows"]


def test_damage_is_named_and_mended(settings: DemoSettings) -> None:
    report = run(settings)
    path = settings.out / "cache" / shard_key(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"shard 1, .*Nothing was trained. Delete") as error:
        run(settings)
    assert "shard 0" not in str(error.value)
    # as the message says
    path.unlink()
    (settings.out / "cache" / "manifest.parquet").unlink()
    teacher = TinyTeacher()
    mended = run(settings, teacher)
    assert mended["captured_now"] == sum(teacher.seen) == 4 * 16
    assert mended["windows"] == report["windows"]


def test_a_shard_that_a_sealed_cache_lacks(settings: DemoSettings) -> None:
    run(settings)
    (settings.out / "cache" / shard_key(2)).unlink()
    with pytest.raises(CacheError, match=r"the cache is sealed, with \d of \d shards"):
        run(settings)


def test_a_cache_of_other_settings_is_refused(settings: DemoSettings) -> None:
    run(settings)
    before = shards(settings)
    with pytest.raises(CacheError, match="k: 6 and 7"):
        run(replace(settings, k=7))
    with pytest.raises(CacheError, match="data: sha256"):
        run(replace(settings, seed=1))
    assert shards(settings) == before


def test_training_settings_leave_the_cache_alone(settings: DemoSettings) -> None:
    run(settings)
    teacher = TinyTeacher(dies_after=0)
    report = run(replace(settings, alpha=0.0, steps=3, cut=2), teacher)
    assert len(report["losses"]["healed"]) == 3
    assert teacher.seen == []


def test_command(settings: DemoSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(smollm2, "SmolLM2", lambda folder: TinyTeacher())
    monkeypatch.setattr(demo, "demo_text", lambda: TEXT)
    sizes = {"window": 16, "train-windows": 10, "held-out": 5, "k": 6, "draws": 4, "steps": 2}
    args = [f"--{name}={value}" for name, value in sizes.items()]
    assert cli.main(["demo", f"--out={settings.out}", *args, "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["settings"]["steps"] == 2
    assert "train healed: 2 steps from the cache" in captured.err


def test_help_names_every_setting(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    out = capfd.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in out for field in fields(DemoSettings))


# A model of transformers


def test_hugging_face_models_fit(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from fastkd.demo.smollm2 import HFModel, load_transformers

    transformers = load_transformers()

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HFModel(transformers.LlamaForCausalLM(config).eval())
    tokens = torch.arange(24).view(2, 12)
    assert torch.allclose(model.hidden(tokens) @ model.head.T, model.model(tokens).logits, atol=1e-6)
    model.keep_layers(kept_layers(5, 5))
    assert len(model.layers) == 4
    assert torch.allclose(model.hidden(tokens) @ model.head.T, model.model(tokens).logits, atol=1e-6)
    model.model.save_pretrained(tmp_path)
    again = HFModel(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert torch.equal(again.hidden(tokens), model.hidden(tokens))
