"""Data sets of examples: what is taken, what is refused in one sentence, and random transforms that are repeatable."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import fastkd
from fastkd.cache import open_cache
from fastkd.cli.main import main
from fastkd.data import Examples, seeded
from fastkd.data.examples import as_examples
from fastkd.errors import DataError, StreamError, TeacherError
from fastkd.settings import LiveSettings
from fastkd.teachers.load import as_data, as_teacher

COUNT, CLASSES = 24, 5
X = torch.from_numpy(np.random.default_rng(0).normal(size=(COUNT, 3, 4, 6)).astype(np.float32))
Y = torch.arange(COUNT) % CLASSES
PIXELS = ((X.clamp(-2, 2) + 2) * 60).to(torch.uint8)


class Images(Dataset[Any]):
    """(image, class), as of torchvision. transform: of an image. kind: what an image and an item are."""

    def __init__(self, transform: Any = None, kind: str = "tensor") -> None:
        self.transform, self.kind = transform, kind

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> Any:
        image: Any = X[number]
        if self.kind == "pil":
            from PIL import Image

            image = Image.fromarray(PIXELS[number].permute(1, 2, 0).numpy())
        if self.transform is not None:
            image = self.transform(image)
        if self.kind == "dictionary":
            return {"pixel_values": image, "labels": Y[number]}
        return image if self.kind == "alone" else (image, int(Y[number]))


class Noise:
    """Draws from all three generators."""

    def __call__(self, image: Any) -> Tensor:
        image = (image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)).float()
        return image + torch.rand(image.shape) * 0.1 + float(np.random.rand()) + random.random()

    def __repr__(self) -> str:
        return "Noise()"


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.convolution(images).relu().mean((2, 3))))
        return logits


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(CLASSES)})
    images = [Images(kind="pil")[i][0] for i in range(COUNT)]
    return datasets.Dataset.from_dict({"image": images, "label": Y.tolist()}, features=features)


TAKEN: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "tensors": (lambda: (X, Y), X),
    "arrays": (lambda: [X.numpy(), Y.numpy()], X),
    "uint8 arrays": (lambda: (PIXELS.numpy(), Y.numpy()), PIXELS),
    "Dataset": (Images, X),
    "Dataset of dictionaries": (lambda: Images(kind="dictionary"), X),
    "TensorDataset": (lambda: TensorDataset(X, Y), X),
    "Subset": (lambda: Subset(Images(), range(COUNT)), X),
    "images of PIL": (lambda: Images(kind="pil"), PIXELS),
    "pairs": (lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)], X),
    "Hugging Face": (hugging_face, PIXELS),
}


def untransformed(image: torch.Tensor) -> torch.Tensor:
    return image


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name: str) -> None:
    make, expected = TAKEN[name]
    found = as_examples(make())
    assert isinstance(found, Examples)
    assert found.labelled
    assert found.classes == CLASSES
    numbers = np.array([3, 20, 7])
    assert torch.equal(found.read(numbers, np.zeros(3, np.int64)), expected[numbers])
    assert found.labels(numbers).tolist() == Y[numbers].tolist()
    assert found.fingerprint() == as_examples(make()).fingerprint()
    other = as_examples((expected.flip(0), Y))
    assert other.fingerprint() != found.fingerprint()


def test_text_is_no_example() -> None:
    for source in ([[1, 2], [3]], ["a", "b"], np.ones((2, 3), np.int64), [np.array([1, 2])], "corpus/*.txt", None):
        assert as_examples(source) is source
    assert isinstance(as_examples(X), Examples)
    assert not as_examples(Images(kind="alone")).labelled


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def items(*found: Any) -> Any:
    return type("Items", (Dataset,), {"__len__": lambda self: len(found), "__getitem__": lambda self, i: found[i]})()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "endless": (Endless, r"got Endless, whose items have no numbers"),
    "three": (lambda: items((X[0], 1, "a")), r"first item is a tuple of Tensor, int, str; expected an image"),
    "keys": (lambda: items({"photo": X[0]}), r"first item is a dictionary with 'photo'; expected"),
    "float class": (
        lambda: items((X[0], 1.5)),
        r"example 0 \(from 0\): got float 1.5 as its class; expected an",
    ),
    "one-hot": (lambda: items((X[0], [0, 1])), r"got int64 of shape \(2,\) as its class"),
    "a name": (lambda: items((X[0], "cat")), r"got str 'cat' as its class"),
    "negative": (lambda: items((X[0], 1), (X[1], -1)), r"labels: got -1 for example 1"),
    "some": (lambda: items((X[0], 1), (X[1], None)), r"example 1 \(from 0\): got no class, but others have one"),
    "labels of a tensor": (lambda: Examples(X, labels=torch.nn.functional.one_hot(Y)), r"give labels.argmax\(1\)"),
    "labels of floats": (lambda: Examples(X, labels=Y.float()), r"labels: got float32 of shape \(24,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as raised:
        as_examples(make()).fingerprint()
    assert "\n" not in str(raised.value)


def test_other_shapes_are_named() -> None:
    data = Examples(items((X[0], 1), (X[1], 0), (X[1][:, :3], 0)))
    with pytest.raises(
        DataError, match=r"example 2 \(from 0\): got torch.float32 of shape \(3, 3, 6\); expected .*\(3, 4"
    ):
        data.read([1, 2], np.zeros(2, np.int64))
    # a transform may make them alike
    crop = seeded(lambda image: image[:, :3], fingerprint="crop")
    assert Examples(items((X[0], 1), (X[1][:, :3], 0)), augment=crop).read([0, 1], np.zeros(2, np.int64)).shape[2] == 3


def test_a_random_augmentation_is_refused_before_the_teacher_runs(tmp_path: Path) -> None:
    for data, message in (
        (
            Images(Noise()),
            r"example 0 \(from 0\): got other values when it was read again, .*seeded\(transform\) in the",
        ),
        (
            Examples(X, labels=Y, augment=lambda x, s: x + torch.rand(x.shape), fingerprint="n"),
            r"same seed, .*augment=fast",
        ),
    ):
        with pytest.raises(DataError, match=message):
            fastkd.capture(Classifier(), data, tmp_path / "cache", held_out=0.0)
    assert not (tmp_path / "cache" / "spec.json").exists()
    fastkd.capture(Classifier(), Images(seeded(Noise())), tmp_path / "cache", held_out=0.0)
    with pytest.raises(DataError, match="got other values when it was read again"):
        fastkd.train(Classifier(), tmp_path / "cache", tmp_path / "run", data=Images(Noise()), steps=1)


def test_seeded_transforms_repeat_and_leave_the_generators() -> None:
    transform, image = seeded(Noise()), X[0]
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index, union-attr]
    first = transform(image, 5)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # type: ignore[index]
    assert random.getstate() == state[2]
    random.random(), torch.rand(1), np.random.rand()
    assert torch.equal(transform(image, 5), first)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image, 5), first)
    for other in (transform(image, 6), seeded(Noise(), seed=1)(image, 5)):
        assert not torch.equal(other, first)
    assert torch.equal(transform(X[:2], np.array([5, 6])), torch.stack([first, transform(X[1], 6)]))
    # without an index, by its values: in a data set, which does not tell it
    assert torch.equal(transform(image), transform(image.clone()))
    assert not torch.equal(transform(X[1]) - X[1], transform(image) - image)
    with pytest.raises(DataError, match="whose repr does not say what it does"):
        Examples(X, augment=seeded(lambda image: image))
    with pytest.raises(DataError, match="got none for untransformed"):
        Examples(X, augment=seeded(untransformed))
    assert seeded(Noise()).fingerprint == "seeded by 0: Noise()"
    with pytest.raises(DataError, match="got int; expected a transform"):
        seeded(5)


@pytest.mark.parametrize("make", [lambda: Images(seeded(Noise())), lambda: seeded(Images(Noise()))])
def test_seeded_in_the_workers_of_a_loader(make: Callable[[], Any]) -> None:
    here = torch.cat([batch for batch, _ in DataLoader(make(), 5)])
    there = torch.cat([batch for batch, _ in DataLoader(make(), 5, num_workers=2)])
    assert torch.equal(here, there)
    assert as_examples(make()).fingerprint() == as_examples(make()).fingerprint()


def test_a_student_sees_what_the_teacher_saw(tmp_path: Path) -> None:
    """Two seeded copies of each image of PIL; dropout draws from the generator that the transform seeds."""
    data = Examples(Images(kind="pil"), augment=seeded(Noise()), copies=2)
    seen: dict[float, Tensor] = {}
    teacher = Classifier()
    teacher.register_forward_pre_hook(lambda _, given: seen.update({float(x.double().sum()): x for x in given[0]}))
    fastkd.capture(teacher, data, tmp_path / "cache", held_out=0.2, k=CLASSES, draws=0, shard_positions=8)
    student, found = Classifier(), []
    student.register_forward_pre_hook(lambda m, given: found.extend(given[0]) if m.training else None)
    options: dict[str, Any] = {"batch_size": 5, "micro_tokens": 4, "steps": 6, "rate": 0.01, "evaluate_every": 3}
    one = fastkd.train(lambda: student, tmp_path / "cache", tmp_path / "a", data=data, **options)
    assert len(found) > 30
    assert all(torch.equal(seen[float(x.double().sum())], x) for x in found)
    again = fastkd.train(Classifier, tmp_path / "cache", tmp_path / "b", data=data, **options)
    assert one.evaluation == again.evaluation
    live = fastkd.train(
        Classifier, None, tmp_path / "c", teacher=Classifier(), data=data, alpha=0.5, **options,
        live=LiveSettings(k=CLASSES, draws=0, held_out=0.2, shard_positions=8, teacher_batch_tokens=3),
    )  # fmt: skip
    assert live.evaluation["accuracy"] == one.evaluation["accuracy"]


class Outputs(nn.Module):
    """What models return beside a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = Classifier(), kind

    def forward(self, images: Tensor) -> Any:
        logits = self.model(images)
        return {"dictionary": {"logits": logits}, "NaN": logits * torch.nan, "tuple": (logits, logits)}[self.kind]


def test_outputs_of_a_teacher(tmp_path: Path) -> None:
    plain, named = (as_teacher(model, (X, Y))(X[:2]) for model in (Classifier(), Outputs("dictionary")))
    assert torch.equal(plain.values, named.values)
    with pytest.raises(TeacherError, match=r"teacher: got tuple from the model; expected logits"):
        as_teacher(Outputs("tuple"), (X, Y))
    with pytest.raises(TeacherError, match=r"example 0 \(from 0\).*NaN") as raised:
        fastkd.capture(Outputs("NaN"), (X, Y), tmp_path / "cache")
    assert ".." not in str(raised.value)


def test_inputs_that_a_teacher_does_not_take() -> None:
    pixels = r"fails on an example of shape \(1, 3, 4, 6\) torch.uint8 .*It takes float32: .*pixels / 255"
    for data, message in (
        ((PIXELS, Y), pixels),
        (Images(kind="pil"), pixels),
        ((X.double(), Y), r"torch.float64 .*It takes float32: give examples of that type\."),
        ((X[:, :1], Y), r"Expected a module that maps examples"),
        (None, r"fails on token ids .*For a classifier, give its examples as the data"),
    ):
        with pytest.raises(TeacherError, match=message) as raised:
            as_teacher(Classifier(), as_examples(data))
        assert "\n" not in str(raised.value)


def test_labels_and_examples_that_do_not_fit_a_cache(tmp_path: Path) -> None:
    data = as_data((X, Y), as_teacher(Classifier(), (X, Y)))
    fastkd.capture(Classifier(), data, tmp_path / "cache", k=CLASSES)
    assert "example" in open_cache(tmp_path / "cache").spec.inputs
    for other, message in (
        (None, "got None with .*, a cache of examples, which it does not contain"),
        (Images(kind="alone"), "got no labels"),
        ((X + 1, Y), r"got sha256 .*the values of the examples, their augmentation, or its seed differ"),
        ((X, Y + 1), "got a label 5; expected classes from 0 to 4"),
        (X, "got no labels"),
    ):
        with pytest.raises(StreamError, match=message):
            fastkd.train(Classifier, tmp_path / "cache", tmp_path / "run", data=other, steps=1)


def test_verify_asks_for_the_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fastkd.capture(Classifier(), (X, Y), tmp_path / "cache", k=CLASSES)
    assert main(["verify", str(tmp_path / "cache"), "--teacher", "test_example_data:Classifier"]) == 1
    error = capsys.readouterr().err
    assert "got a cache of examples, which it does not contain" in error
    assert "--examples module:factory" in error


def test_seeded_transforms_take_flipped_arrays_and_single_numbers() -> None:
    transform = seeded(lambda value: random.random(), fingerprint="draw")
    flipped = np.asarray(X[0])[:, ::-1]  # its strides are negative, as of an image whose channels were swapped
    assert transform(flipped) == transform(flipped.copy()) != transform(np.asarray(X[0]))
    assert transform(np.float32(2)) == transform(torch.tensor(2.0)) != transform(3.0)
    with pytest.raises(DataError, match="got <U1 as an example; expected numbers, or an image"):
        transform(np.array(["a"]))


def test_generators_are_restored_after_a_failure_too() -> None:
    def fails(value: Any) -> Any:
        torch.rand(3), np.random.rand(3), random.random()
        raise KeyError(value)

    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    with pytest.raises(KeyError):
        seeded(fails, fingerprint="fails")(X[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]
