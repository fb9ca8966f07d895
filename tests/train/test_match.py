"""`fastkd match`: the table of CKA against an oracle and by what it must find, and the student that it writes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import model_of, saved
from match_cases import add_feature
from torch import Tensor, nn
from train_cases import Tiny, documents, make_cache
from vision_cases import Net, examples
from vision_cases import make_cache as make_image_cache

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.cli.main import main
from fastkd.errors import StreamError, TrainError
from fastkd.evaluate.api import evaluate
from fastkd.models.hub import load_transformers
from fastkd.models.pruned import OriginalLayers, keep_layers, original_layers
from fastkd.models.taps import Taps
from fastkd.train.match import match
from fastkd.train.similarity import Hsic, similarity
from fastkd.train.student import make_student


@torch.no_grad()
def states_of(teacher: nn.Module, name: str, arrays: dict[str, Any]) -> np.ndarray:
    """A teacher's states at the positions of a shard, document by document."""
    parts = torch.from_numpy(arrays["tokens"].astype(np.int64)).split(arrays["document_lengths"].tolist())
    rows = []
    for tokens in parts:
        with Taps(teacher, [name]) as taps:
            teacher(tokens[None])
        rows.append(taps.values[name][0])
    return torch.cat(rows).numpy()


def add_states(cache: Cache, teacher: nn.Module, *names: str, layers: int, width: int) -> None:
    for name in names:
        add_feature(cache, name, layers=layers, width=width, values=partial(states_of, teacher, name))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    cache = make_cache(tmp_path_factory.mktemp("tiny") / "cache", documents(200), shard_positions=512)
    add_states(cache, Tiny(seed=7), "1", "2", "-1", layers=3, width=12)
    return cache


def oracle(x: Tensor, y: Tensor) -> float:
    """The unbiased HSIC, as in equation 5 of Song et al. (2012)."""
    n = len(x)
    k, h = ((z @ z.T).fill_diagonal_(0.0) for z in (x, y))
    one = torch.ones(n, dtype=x.dtype)
    both = one @ k @ one * (one @ h @ one) / ((n - 1) * (n - 2))
    return float((torch.trace(k @ h) + both - 2 / (n - 2) * (one @ k @ h @ one)) / (n * (n - 3)))


def test_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        [torch.randn(n, width, generator=generator, dtype=torch.float64) + 3 for width in (5, 40, 7)]
        for n in (20, 31, 20)
    ]
    sums = Hsic()
    for x, y, z in batches:
        sums.add([x, y, None], z)
    values, halves = sums.cka()
    for place in (0, 1):
        three = [
            sum(oracle(b[i], b[j]) for b in batches) / len(batches) for i, j in ((place, 2), (place, place), (2, 2))
        ]
        assert values[place] == pytest.approx(three[0] / (three[1] * three[2]) ** 0.5, rel=1e-9)
    assert np.isnan(values[2])
    assert sums.vectors == 71
    assert np.isfinite(halves[:2]).all()


def test_what_cka_must_be() -> None:
    """1 of rotations; of few rows of nothing in common near 0, where the usual one is not; that of many rows."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    few, many = Hsic(), Hsic()
    usual: list[tuple[Tensor, Tensor]] = []
    for _ in range(20):
        x, noise = torch.randn(64, 30, generator=generator), torch.randn(64, 50, generator=generator)
        y = torch.cat([x[:, :10], noise[:, 10:]], 1)
        few.add([3 * x @ rotation + 1, noise, y], x)
        usual.append((y, x))
    for y, x in usual:
        many.add([y], x)
    values, halves = few.cka()
    assert values[0] == pytest.approx(1.0, abs=1e-5)
    assert abs(values[1]) < 0.02
    assert abs(values[1]) < 3 * halves[1]
    y, x = (torch.cat(side).double() for side in zip(*usual, strict=True))
    y, x = y - y.mean(0), x - x.mean(0)
    biased = float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
    assert values[2] == pytest.approx(biased, abs=0.03)
    z, w = noise.double() - noise.double().mean(0), usual[-1][1].double()
    assert float((w.T @ z).square().sum() / ((w.T @ w).norm() * (z.T @ z).norm())) > 0.3


def test_a_teacher_is_like_itself(tiny: Cache) -> None:
    student = make_student(Tiny(seed=7), tiny.spec).student
    student.train()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    found = similarity(student, tiny, positions=1500)
    assert found.features == ("1", "2", "-1")
    assert found.places == ("0", "1", "2", "3")
    assert found.best == {"1": "1", "2": "2", "-1": "3"}
    for column, row in enumerate((1, 2, 3)):
        assert found.values[row, column] == pytest.approx(1.0, abs=1e-3)
    assert set(found.vectors) == {1500}
    assert np.isfinite(found.halves).all()
    assert [str(one) for one in found.matches] == ["1:1:mse:auto", "2:2:mse:auto", "-1:3:mse:auto"]
    assert found.text.splitlines()[-1] == "--match 1:1:mse:auto 2:2:mse:auto -1:3:mse:auto"
    assert "3 (final norm)" in found.text
    assert student.training
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
    other = similarity(make_student(Tiny(seed=8), tiny.spec).student, tiny, positions=1500)
    assert np.nanmax(other.values) < 0.9
    assert not np.array_equal(similarity(student, tiny, positions=200, seed=1).values, found.values)
    assert similarity(student, tiny, features=["3"], positions=500).features == ("3",)


def test_maps_of_images(tmp_path: Path) -> None:
    teacher = Net(seed=7)
    cache = make_image_cache(tmp_path, teacher=teacher, k=7, draws=0)
    data = examples()

    @torch.no_grad()
    def maps(arrays: dict[str, Any]) -> np.ndarray:
        return teacher.convolution(data.read(arrays["example"], arrays["augmentation_seed"])).numpy()

    add_feature(cache, "convolution", shape=(5, 4, 4), values=maps)
    add_feature(cache, "convolution:at", shape=(4, 4), values=lambda arrays: np.square(maps(arrays)).mean(1))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Conv2d(1, 3, 3, stride=2)
            self.same = teacher.convolution
            self.head = nn.Linear(3, 7)

        def forward(self, images: Tensor) -> Tensor:
            self.same(images)
            return self.head(self.small(images).mean((2, 3)))

    found = similarity(make_student(Two(), cache.spec, data=data).student, cache, data=data, positions=1000)
    assert found.places == ("small", "same")  # the head returns no maps
    assert found.best == {"convolution": "same", "convolution:at": "same"}
    assert found.values[1] == pytest.approx([1.0, 1.0], abs=0.01)
    assert np.isfinite(found.values[0]).all()
    assert [str(one) for one in found.matches] == ["convolution:same:hint:auto", "convolution:at:same:at:auto"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a pruned copy, configs of others, and a cache with features."""
    place = tmp_path_factory.mktemp("llama")
    saved(place, "llama", num_hidden_layers=4)
    teacher = model_of("llama", num_hidden_layers=4)
    fastkd.capture(teacher, documents(80), place / "cache", k=6, draws=3, context=16, held_out=0.1)
    add_states(open_cache(place / "cache"), teacher, "2", "-1", layers=4, width=32)
    keep_layers(teacher, [0, 1, 3])
    teacher.save_pretrained(place / "pruned")
    model_of("llama", num_hidden_layers=2).config.save_pretrained(place / "short")
    model_of("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=2).config.save_pretrained(
        place / "thin"
    )
    return place


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["match", str(llama / "pruned"), str(llama / "cache"), "--positions", "600", "--device", "cpu"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["2"] == "2"  # what entered the layer that is gone
    assert found["cka"]["2"]["2"] == pytest.approx(1.0, abs=1e-3)
    assert found["match"][0] == "2:2:mse:auto"
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "linear CKA of 600 positions" in text
    assert "--match 2:2:mse:auto" in text
    short = ["match", str(llama / "short"), *given[2:], "--teacher", str(llama / "llama"), "--init"]
    assert main([*short, str(tmp_path / "made")]) == 0
    text = capsys.readouterr().out
    assert "layers: 0 from 1, 1 from 3" in text
    made = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    teacher = model_of("llama", num_hidden_layers=4)
    keep_layers(teacher, [1, 3])
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).logits, teacher(tokens).logits, rtol=0, atol=0)
    assert original_layers(made) == OriginalLayers((1, 3), 4)
    assert main([*short, str(tmp_path / "made")]) == 1
    assert "which has files; expected a new folder" in capsys.readouterr().err
    assert main([*short, str(tmp_path / "other"), "--match", "2:1:mse:1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["init"]["layers"] == [1, 3]


def test_a_thin_student_is_written(llama: Path, tmp_path: Path) -> None:
    found = match(str(llama / "thin"), open_cache(llama / "cache"), positions=200, teacher=llama / "llama",
                  init=tmp_path / "made")  # fmt: skip
    assert found.initialised is not None
    assert found.initialised.layers == (None, None)
    assert "least squares, over" in found.initialised.lm_head
    assert evaluate(make_student(tmp_path / "made", None).student, llama / "cache").count > 0
    assert "layers: left as it was: 0, 1" in found.text


def test_refused(tiny: Cache, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_cache(tmp_path / "plain")
    with pytest.raises(TrainError, match="has no features to compare with"):
        match(Tiny(), plain)
    with pytest.raises(StreamError, match=r"'7', and .* has 1, 2, -1"):
        match(Tiny(), tiny, features=["7"])
    for given in ({"teacher": Tiny()}, {"init": tmp_path / "out"}):
        with pytest.raises(TrainError, match="expected both, or neither"):
            match(Tiny(), tiny, **given)
    with pytest.raises(TrainError, match="positions: got 3"):
        match(Tiny(), tiny, positions=3)
    with pytest.raises(TrainError, match="teacher: got one with 3 layers; expected the cache's, with 4"):
        match(llama / "short", open_cache(llama / "cache"), positions=100, teacher=Tiny(), init=tmp_path / "out")
    with pytest.raises(TrainError, match=r"teacher: .*no such file or folder"):
        match(llama / "short", open_cache(llama / "cache"), positions=100, teacher="a/b/c", init=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["match", "train_cases:tiny", str(tmp_path / "plain"), "--init", "x"]) == 1
    assert "--init, --teacher: got init alone; expected both" in capsys.readouterr().err
