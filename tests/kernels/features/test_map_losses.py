"""hint, at and sp on feature maps: against the oracle, of some examples, of other sizes, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import close, draw, rotated64, value_and_gradients
from torch import Tensor

from fastkd.kernels import HiddenTargets, KDError, find_feature_loss

NAMES = ("hint", "at", "sp")
EXAMPLES, CHANNELS, HEIGHT, WIDE = 5, 6, 3, 4
SHAPE = (CHANNELS, HEIGHT, WIDE)


def teacher_maps(seed: int = 0) -> Tensor:
    return draw(EXAMPLES, *SHAPE, seed=seed) * (1 + draw(EXAMPLES, 1, HEIGHT, WIDE, seed=seed + 1).abs())


def targets_of(maps: Tensor, index: Tensor | None = None) -> HiddenTargets:
    """Each pixel is a vector of its channels; one pixel of zeros is exact."""
    pixels = maps.movedim(1, -1).reshape(-1, CHANNELS).clone()
    pixels[7] = 0
    return rotated64(HiddenTargets.from_states(pixels, step=0.05, index=index))


def attention_targets(maps: Tensor) -> HiddenTargets:
    return rotated64(HiddenTargets.from_states(maps.square().mean(1).flatten(1), step=1e-3))


def student_for(name: str, size: tuple[int, int] = (HEIGHT, WIDE), examples: int = EXAMPLES) -> Tensor:
    return draw(examples, CHANNELS if find_feature_loss(name).projector else 2, *size, seed=8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(HEIGHT, WIDE), (6, 8), (7, 5), (2, 2)])
def test_code_space_is_dense_space(name: str, size: tuple[int, int]) -> None:
    found, student, targets = find_feature_loss(name), student_for(name, size), targets_of(teacher_maps())
    assert targets.exact_rows.tolist() == [7]
    for num_items in (None, 120, torch.tensor(120.0)):
        ours = value_and_gradients(found.loss, student, targets, num_items, shape=SHAPE)
        close(ours, value_and_gradients(found.oracle, student, targets, num_items, shape=SHAPE), 1e-9)
        assert ours[1].abs().max() > 1e-5


@pytest.mark.parametrize("name", ["at", "sp"])
def test_a_stored_attention_map_serves_for_the_maps(name: str) -> None:
    found, student, maps = find_feature_loss(name), student_for(name, (6, 8)), teacher_maps()
    targets, shape = attention_targets(maps), SHAPE[1:]
    ours = value_and_gradients(found.loss, student, targets, 10, shape=shape)
    close(ours, value_and_gradients(found.oracle, student, targets, 10, shape=shape), 1e-9)
    if name == "at":
        pixels = maps.movedim(1, -1).reshape(-1, CHANNELS)
        whole = rotated64(HiddenTargets.from_states(pixels, step=1e-3))
        of_maps = found.loss(student, whole, 10 * HEIGHT * WIDE, shape=SHAPE)
        assert float(ours[0]) == pytest.approx(float(of_maps), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name: str) -> None:
    targets, found = targets_of(teacher_maps()), find_feature_loss(name)
    student = student_for(name, (3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: found.loss(s, targets, shape=SHAPE), student, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_only_examples_with_targets_are_compared(name: str) -> None:
    found, student, maps = find_feature_loss(name), student_for(name), teacher_maps()
    vectors, chosen = HEIGHT * WIDE, torch.tensor([1, 4])
    index = (chosen[:, None] * vectors + torch.arange(vectors)).flatten()
    some = replace(targets_of(maps[chosen]), index=index)
    ours = value_and_gradients(found.loss, student, some, 99, shape=SHAPE)
    close(ours, value_and_gradients(found.oracle, student, some, 99, shape=SHAPE), 1e-9)
    alone = value_and_gradients(found.loss, student[chosen], replace(some, index=None), 99, shape=SHAPE)
    torch.testing.assert_close(ours[0], alone[0])
    torch.testing.assert_close(ours[1][chosen], alone[1])
    assert not ours[1][[0, 2, 3]].any()


@pytest.mark.parametrize("name", ["hint", "at"])
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    found, student, maps = find_feature_loss(name), student_for(name), teacher_maps()
    targets, vectors = targets_of(maps), HEIGHT * WIDE
    whole = found.loss(student, targets, 500, shape=SHAPE)
    parts = [
        found.loss(student[a:b], targets[a * vectors : b * vectors], 500, shape=SHAPE)
        for a, b in ((0, 2), (2, 2), (2, 5))
    ]
    assert float(parts[1]) == 0
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", NAMES)
def test_no_examples_are_a_loss_of_zero_with_a_graph(name: str) -> None:
    student = student_for(name, examples=0).requires_grad_()
    loss = find_feature_loss(name).loss(student, targets_of(teacher_maps())[:0], 5, shape=SHAPE)
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_its_teacher_has_no_loss_and_one_of_the_next_example_has(name: str) -> None:
    found, maps = find_feature_loss(name), teacher_maps()
    pixels = maps.movedim(1, -1).reshape(-1, CHANNELS)
    targets = rotated64(HiddenTargets.from_states(pixels, step=1e-3))
    student = pixels @ targets.basis if found.projector else pixels
    student = student.reshape(EXAMPLES, HEIGHT, WIDE, CHANNELS).movedim(-1, 1)
    assert float(found.loss(student, targets, shape=SHAPE)) < 1e-5
    assert float(found.loss(student.roll(1, 0), targets, shape=SHAPE)) > 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    found, student, targets = find_feature_loss(name), student_for(name).to(dtype), targets_of(teacher_maps())
    ours = value_and_gradients(found.loss, student, targets, shape=SHAPE)
    assert (ours[0].dtype, ours[1].dtype) == (torch.float32, dtype)
    oracle = value_and_gradients(found.oracle, student.double(), targets, shape=SHAPE)
    close(ours[:1], oracle[:1], 4e-6)
    close(ours[1:], oracle[1:], 4 * torch.finfo(dtype).eps)


def test_what_does_not_fit_is_named() -> None:
    targets = targets_of(teacher_maps())
    cases: tuple[tuple[str, Any, Any, str], ...] = (
        (
            "hint",
            draw(5, 2, 3, 4),
            SHAPE,
            "student: got maps of 2 channels, and the teacher's have 6",
        ),
        ("hint", draw(5, 6, 3, 4), (6,), r"shape: got \(6,\)"),
        ("at", draw(5, 2, 3), SHAPE, r"student: got \(5, 2, 3\) torch.float64; expected maps"),
        ("at", draw(4, 2, 3, 4), SHAPE, "student: got 4 examples; expected 5, those of the targets"),
        ("sp", draw(5, 2, 3, 4), (7, 3, 4), r"shape: got \(7, 3, 4\) for targets of 6 components"),
        ("sp", draw(5, 2, 3, 4), (6, 7, 7), "targets: got 60 rows; expected 49 for each example"),
        ("at", draw(5, 2, 3, 4), (3, 4), r"shape: got \(3, 4\) for targets of 6 components"),
    )
    for name, student, shape, says in cases:
        with pytest.raises(KDError, match=says):
            find_feature_loss(name).loss(student, targets, shape=shape)
    with pytest.raises(KDError, match=r"shape: got \(3, 4\); expected that of feature maps"):
        find_feature_loss("hint").loss(draw(5, 12, 3, 4), attention_targets(teacher_maps()), shape=(3, 4))
